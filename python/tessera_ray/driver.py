"""The Ray driver behind `tessera serve`: reserves room on Ray's nodes, runs an agent on each, watches them.

A child of `serve`, which runs `python driver.py DESCRIPTOR`: on that descriptor both sides write one JSON
object per line. No token and no tensor comes here. What serve asks, and what it is told:

  {"do": "connect"}                  connected: address and host of this node, versions, nodes
  {"do": "reserve", ...Request}      waiting (again and again), then placed: nodes with their ranks and probes
  {"do": "start", "commands": [[word]], "set": {name: text or null}, "default": {name: text}}
                                     started, for each node; later exited or lost, whenever that happens
  {"do": "stop"}                     stopped; nothing of it is left in the cluster

Every refusal is {"event": "failed", "text": ...}. When the descriptor closes, serve is gone, and so are the
agents.
Imports Ray only when it connects: the plans above it are plain functions.
"""

import dataclasses
import hashlib
import json
import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

CONNECT_LIMIT_S = 60
READY_LIMIT_S = 10  # of a reservation whose room was free a moment ago
AGENT_LIMIT_S = 60
STOP_LIMIT_S = 5
LAST_LINES = 8
# Left out of a node's environment: Ray sets them for its own workers.
RAYS_OWN = ("OMP_NUM_THREADS", "ASCEND_RT_VISIBLE_DEVICES", "PYTHONBREAKPOINT", "SPT_NOENV", "LD_PRELOAD")


class Refused(Exception):
    """What serve must tell its user."""


# -- Plans: where ranks go. Plain data, no Ray.


@dataclasses.dataclass
class Node:
    id: str
    address: str
    host: str
    total: dict  # resource: amount
    free: dict
    is_driver: bool = False

    def room(self, resource, amount):
        """How many ranks fit."""
        return int(self.free.get(resource, 0) / amount + 1e-9)


@dataclasses.dataclass
class Request:
    groups: int  # data-parallel groups, each with `ranks_per_group`
    ranks_per_group: int
    local_groups: int | None  # --data-parallel-size-local
    strategy: str  # pack: groups may span nodes; strict, fill: whole groups (docs/ray.md)
    resource: str  # empty: NPU where there is enough of it, else CPU
    cores_per_rank: int  # 0: an even share of the cluster's
    timeout_s: float
    model: str
    binary: str

    @property
    def world(self):
        return self.groups * self.ranks_per_group


def in_order(nodes):
    """The driver's node first, then by address: the order of ranks."""
    number = lambda node: [int(part) if part.isdigit() else -1 for part in node.address.split(".")]
    return sorted(nodes, key=lambda node: (not node.is_driver, number(node), node.address, node.id))


def choose_resource(request, nodes):
    """(resource, amount per rank, why)"""
    total = lambda name: sum(node.total.get(name, 0) for node in nodes)
    world, cpus = request.world, total("CPU")
    cores = request.cores_per_rank or max(1, int(cpus // world))
    if request.resource:
        return request.resource, cores if request.resource == "CPU" else 1, "--ray-resource"
    if total("NPU") >= world:
        return "NPU", 1, f"the cluster advertises {total('NPU'):g} NPU for {world} ranks"
    if cpus >= world * cores or total("NPU") == 0:
        return "CPU", cores, f"the cluster advertises {total('NPU'):g} NPU, too few for {world} ranks"
    return "NPU", 1, f"neither the {total('NPU'):g} NPU nor the {cpus:g} CPU are enough for {world} ranks"


def plan(request, nodes, resource, amount):
    """[[node of each rank] of each group], or None where it does not fit."""
    room = {node.id: node.room(resource, amount) for node in nodes}
    nodes, size = in_order(nodes), request.ranks_per_group
    if request.strategy == "pack":
        return (
            [_pack(nodes, room, size) for _ in range(request.groups)] if _fits(room, request.world) else None
        )
    placed = []
    for node in nodes:
        fitting = room[node.id] // size
        if request.local_groups and (request.strategy == "strict" or node.is_driver):
            if fitting < request.local_groups:
                continue
            fitting = request.local_groups
        placed += [[node] * size] * min(fitting, request.groups - len(placed))
    return placed if len(placed) == request.groups else None


def _fits(room, world):
    return sum(room.values()) >= world


def _pack(nodes, room, size):
    """One group on one node if that can be, else over as few as possible. Takes its room."""
    whole = [node for node in nodes if room[node.id] >= size]
    wider = sorted(nodes, key=lambda node: (not node.is_driver, -room[node.id]))
    taken = []
    for node in whole[:1] or wider:
        count = min(room[node.id], size - len(taken))
        room[node.id] -= count
        taken += [node] * count
    return sorted(taken, key=nodes.index)


def shortage(request, nodes, resource, amount):
    """What is asked, what is there, what is missing."""
    asked = request.world * amount
    free = sum(node.free.get(resource, 0) for node in nodes)
    there = ", ".join(
        f"{node.address} {node.free.get(resource, 0):g} of {node.total.get(resource, 0):g}"
        for node in in_order(nodes)
    )
    text = (
        f"asked for {asked:g} {resource} ({request.world} ranks), free are {free:g} "
        f"of {sum(node.total.get(resource, 0) for node in nodes):g} ({there})"
    )
    if free < asked:
        return f"{text}; missing {asked - free:g}"
    size = f"{request.ranks_per_group * amount:g} {resource}"
    if request.local_groups:
        return f"{text}; but not so that nodes take {request.local_groups} groups of {size} each"
    return f"{text}; but not so that whole groups of {size} fit on single nodes"


# -- The agent: on every node that has ranks. Ray sends the class there by value.


class Agent:
    """Starts this node's `tessera serve --headless`, which ends when this process does, and sees it end."""

    def __init__(self):
        self.child = None
        self.lines = []

    def probe(self, model, binary):
        """What serve compares before anything is loaded."""
        found = {
            "cores": len(os.sched_getaffinity(0)),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
            "binary": "",
            "version": "",
            "model": os.path.isfile(os.path.join(model, "config.json")),
            "monitor": True,
        }
        if os.access(binary, os.X_OK):
            with open(binary, "rb") as file:
                found["binary"] = hashlib.file_digest(file, "sha256").hexdigest()
            said = subprocess.run([binary, "--version"], capture_output=True, text=True)
            found["version"] = said.stdout.strip() or said.stderr.strip()[-200:]
        try:
            with open(f"/proc/{os.environ['RAY_RAYLET_PID']}/environ", "rb") as file:
                found["monitor"] = b"RAY_memory_monitor_refresh_ms=0" not in file.read().split(b"\0")
        except (KeyError, OSError):
            pass  # unknown counts as on
        return found

    def start(self, command, changes, defaults, left_out):
        """The child's process, and what Ray does to it that cannot be undone."""
        environment = {name: text for name, text in os.environ.items() if name not in left_out}
        environment = (
            defaults | environment | {name: text for name, text in changes.items() if text is not None}
        )
        for name, text in changes.items():
            if text is None:
                environment.pop(name, None)
        notes = []
        try:  # of this thread, from which the child inherits it
            os.setpriority(os.PRIO_PROCESS, 0, min(0, os.getpriority(os.PRIO_PROCESS, os.getppid())))
        except PermissionError:
            notes.append(
                f"ranks run at nice {os.getpriority(os.PRIO_PROCESS, 0)}, as Ray's workers do: "
                "run `ray start` with RAY_worker_niceness=0"
            )
        inside, self.lifeline = os.pipe()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray blocks SIGINT
        self.child = subprocess.Popen(
            command,
            env=environment | {"TESSERA_LIFELINE": str(inside)},
            pass_fds=[inside],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        os.close(inside)
        try:
            with open(f"/proc/{self.child.pid}/oom_score_adj", "w") as file:
                file.write("0")
        except OSError:
            notes.append(
                "the kernel would end the ranks first when memory runs out, as Ray's workers: "
                "run `ray start` with RAY_worker_oom_score_adjustment=0"
            )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return {"process": self.child.pid, "notes": notes}

    def _read(self):
        for line in self.child.stdout:
            print(line, end="", flush=True)  # into Ray's log of this worker
            self.lines = [*self.lines, line.rstrip()][-LAST_LINES:]

    def wait(self):
        """Blocks until the child has ended."""
        code = self.child.wait()
        self.reader.join(1)
        return {"code": code, "tail": self.lines}

    def stop(self, limit_s):
        if self.child is None or self.child.poll() is not None:
            return
        self.child.terminate()
        try:
            self.child.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.child.kill()


# -- The driver


def cluster_address():
    """HOST:PORT of the cluster that RAY_ADDRESS names or that `ray start` began on this host."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto"):
        path = os.path.join(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        try:
            with open(path) as file:
                address = file.read().strip()
        except OSError:
            raise Refused(
                "no Ray cluster on this host: run `ray start --head --port=6379` first (or `ray start "
                "--address=HEAD:PORT` to join one), or name one by RAY_ADDRESS=HEAD:PORT"
            ) from None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise Refused(f"RAY_ADDRESS is '{address}'; wanted HOST:PORT, as `ray start` prints it, or unset")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise Refused(
            f"the Ray cluster at {address} does not answer ({error.strerror or error}): is `ray start "
            "--head` still running there? `ray status` shows"
        ) from None
    return address


class Driver:
    def __init__(self, link):
        self.link = link
        self.out = link.makefile("w", encoding="utf-8")
        self.requests = queue.Queue()  # None: serve is gone
        self.ray = None
        self.groups = []  # placement groups
        self.agents = []
        self.waits = {}  # future of an agent's end: number of its node
        self.driver_node = ""

    def tell(self, event, **values):
        try:
            self.out.write(json.dumps({"event": event} | values) + "\n")
            self.out.flush()
        except OSError:
            self.requests.put(None)

    def read(self):
        for line in self.link.makefile("r", encoding="utf-8"):
            self.requests.put(json.loads(line))
        self.requests.put(None)

    def run(self):
        threading.Thread(target=self.read, daemon=True).start()
        while True:
            try:
                request = self.requests.get(timeout=0.1 if self.waits else None)
            except queue.Empty:
                self.watch()
                continue
            if request is None or request["do"] == "stop":
                self.stop()
                self.tell("stopped")
                return
            do = request.pop("do")
            try:
                {"connect": self.connect, "reserve": self.reserve, "start": self.start}[do](request)
            except Refused as refused:
                self.tell("failed", text=str(refused))
            except Exception as error:
                self.tell("failed", text=f"Ray, asked to {do}: {type(error).__name__}: {error}")

    # What serve asks for

    def connect(self, _):
        import ray

        address = cluster_address()
        watchdog = threading.Timer(CONNECT_LIMIT_S, self.give_up, [address])
        watchdog.daemon = True
        watchdog.start()
        try:
            ray.init(address=address, namespace="tessera", log_to_driver=False, logging_level="ERROR")
        except RuntimeError as error:
            if "ersion mismatch" not in str(error):
                raise
            raise Refused(
                "the Ray cluster runs other versions than this host's Python: "
                f"{' '.join(str(error).split())[:600]}; give --ray-python the one that ran `ray start`"
            ) from None
        watchdog.cancel()
        self.ray = ray
        self.driver_node = ray.get_runtime_context().get_node_id()
        nodes = self.nodes()
        self.tell(
            "connected",
            cluster=address,
            address=ray.util.get_node_ip_address(),
            ray=ray.__version__,
            python=platform.python_version(),
            nodes=[
                {"address": node.address, "host": node.host, "total": node.total} for node in in_order(nodes)
            ],
        )

    def give_up(self, address):
        self.tell(
            "failed",
            text=f"Ray does not let us in at {address} within {CONNECT_LIMIT_S} s; where the cluster has a "
            "token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH must be set here too",
        )
        os._exit(1)

    def nodes(self):
        free = self.ray._private.state.available_resources_per_node()
        return [
            Node(
                id=node["NodeID"],
                address=node["NodeManagerAddress"],
                host=node["NodeManagerHostname"],
                total=node["Resources"],
                free=free.get(node["NodeID"], {}),
                is_driver=node["NodeID"] == self.driver_node,
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def reserve(self, values):
        request = Request(**values)
        resource, amount = self.take_room(request)
        table = self.ray.util.placement_group_table
        bundles = {}  # node: [(placement group, bundle)]
        for group in self.groups:
            for bundle, node in sorted(table(group)["bundles_to_node_id"].items()):
                bundles.setdefault(node, []).append((group, bundle))
        nodes = in_order([node for node in self.nodes() if node.id in bundles])
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        share = (
            {"num_cpus": amount} if resource == "CPU" else {"num_cpus": 0, "resources": {resource: amount}}
        )
        for node in nodes:
            group, bundle = bundles[node.id][0]
            options = {
                "max_restarts": 0,
                "max_task_retries": 0,
                "max_concurrency": 4,
                "scheduling_strategy": strategy(group, placement_group_bundle_index=bundle),
            }
            self.agents.append(self.ray.remote(Agent).options(**options, **share).remote())
        probes = self.of_agents(
            [agent.probe.remote(request.model, request.binary) for agent in self.agents], nodes
        )
        first, placed = 0, []
        for node, probe in zip(nodes, probes, strict=True):
            count = len(bundles[node.id])
            placed.append(
                {"address": node.address, "host": node.host, "first": first, "count": count, "probe": probe}
            )
            first += count
        self.tell("placed", resource=resource, amount=amount, nodes=placed)

    def of_agents(self, futures, nodes):
        """Results in the order of the nodes."""
        found = []
        for future, node in zip(futures, nodes, strict=True):
            try:
                found.append(self.ray.get(future, timeout=AGENT_LIMIT_S))
            except self.ray.exceptions.GetTimeoutError:
                raise Refused(f"the agent on {node.address} ({node.host}) did not answer") from None
            except self.ray.exceptions.RayError as error:
                text = " ".join(str(error).split())[:400]
                raise Refused(f"the agent on {node.address} ({node.host}) failed: {text}") from None
        return found

    def take_room(self, request):
        """Waits for the resources; then self.groups hold them. (resource, amount per rank)"""
        begin = time.monotonic()
        pause, next_line, said = 2.0, begin, ""
        while True:
            nodes = self.nodes()
            resource, amount, why = choose_resource(request, nodes)
            if f"{resource} {amount}" != said:
                said = f"{resource} {amount}"
                self.tell("waiting", text=f"a rank takes {amount} {resource} of Ray: {why}")
            placed = plan(request, nodes, resource, amount)
            if placed and self.hold(request, placed, resource, amount):
                return resource, amount
            now = time.monotonic()
            text = shortage(request, nodes, resource, amount)
            if now - begin >= request.timeout_s:
                raise Refused(
                    f"Ray has no room within {request.timeout_s:g} s (--ray-timeout): {text}; add nodes with "
                    f"`ray start --address=... --resources='{{\"{resource}\": N}}'`, or ask for fewer ranks"
                )
            if now >= next_line:
                left = request.timeout_s - (now - begin)
                self.tell("waiting", text=f"waiting for room in Ray: {text}; {left:.0f} s left")
                next_line, pause = now + pause, min(60, pause * 2)
            try:
                if (asked := self.requests.get(timeout=0.3)) is None or asked["do"] == "stop":
                    self.requests.put(asked)
                    raise Refused("stopped while waiting for room in Ray")
            except queue.Empty:
                pass

    def hold(self, request, placed, resource, amount):
        """Whether the plan could be reserved."""
        for ranks in placed:
            self.groups.append(
                self.ray.util.placement_group(
                    [{resource: amount}] * len(ranks),
                    strategy="PACK" if request.strategy == "pack" else "STRICT_PACK",
                    bundle_label_selector=[{"ray.io/node-id": node.id} for node in ranks],
                )
            )
        if all(group.wait(READY_LIMIT_S) for group in self.groups):
            return True
        self.release()  # somebody was faster
        return False

    def start(self, request):
        futures = [
            agent.start.remote(command, request["set"], request["default"], RAYS_OWN)
            for agent, command in zip(self.agents, request["commands"], strict=True)
        ]
        for number, future in enumerate(futures):
            self.tell("started", node=number, **self.ray.get(future, timeout=AGENT_LIMIT_S))
        self.waits = {agent.wait.remote(): number for number, agent in enumerate(self.agents)}

    def watch(self):
        ended, _ = self.ray.wait(list(self.waits), num_returns=1, timeout=0.2)
        for future in ended:
            number = self.waits.pop(future)
            try:
                self.tell("exited", node=number, **self.ray.get(future))
            except self.ray.exceptions.RayError as error:  # died, or cannot be reached: the same to us
                self.tell(
                    "lost", node=number, text=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )

    def release(self):
        for group in self.groups:
            self.ray.util.remove_placement_group(group)
        self.groups = []

    def stop(self):
        if self.ray is None:
            return
        try:
            stops = [agent.stop.remote(STOP_LIMIT_S) for agent in self.agents]
            self.ray.wait(stops, num_returns=len(stops), timeout=STOP_LIMIT_S + 1) if stops else None
            for agent in self.agents:
                self.ray.kill(agent)
            self.release()
        except self.ray.exceptions.RayError:
            pass  # a cluster that is gone has nothing of ours
        self.ray.shutdown()


def main():
    os.dup2(2, 1)  # Ray prints to stdout when it likes
    # The cluster's head is gone: end soon, and with us the agents.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # serve says when
    Driver(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
