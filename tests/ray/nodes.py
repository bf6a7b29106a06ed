"""Ray's nodes under test: how they start, what they leave behind, how they die. No test lives here.

`ray stop` matches processes by name on the whole machine: it is never used. Every node carries a mark in its
environment, which its workers and what they start inherit.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
import uuid

from launch import wait_for

START_LIMIT_S = 60
PORT = 6379
# Deaths are noticed soon, and a stopped node does not wait for its actors.
QUICK = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
# What docs/ray.md asks for.
ASKED = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_worker_oom_score_adjustment": "0",
}


def marked(mark):
    """{process: words of its command line} of all living processes with the mark."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if f"TESSERA_NODE_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


class Node:
    """One `ray start --block`."""

    def __init__(self, ray, folder, host, head, npus=8, hidden=None, environment=None):
        self.mark, self.host = uuid.uuid4().hex, host
        self.log = folder / f"{self.mark[:6]}.log"
        where = [f"--port={PORT}", "--include-dashboard=false"] if head is None else [f"--address={head}"]
        self.words = words = [
            ray / "ray", "start", "--block", "--disable-usage-stats", "--include-log-monitor=false",
            "--num-cpus=0",
            "--object-store-memory=80000000", "--log-style=record", "--log-color=false",
            f"--node-ip-address={host.address}", f"--temp-dir={folder / self.mark[:4]}",
            f"--resources={{\"NPU\": {npus}}}", *(["--head"] if head is None else []), *where,
        ]  # fmt: skip
        command = host.command(*words)
        if hidden:  # a folder that this node does not have
            shadow = f'mount -t tmpfs -o size=1m none {hidden} && exec "$@"'
            command = host.command("unshare", "-m", "sh", "-c", shadow, "sh", *words)
        clean = {name: text for name, text in os.environ.items() if not name.startswith(("TESSERA_", "RAY_"))}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=clean | QUICK | ASKED | {"TESSERA_NODE_MARK": self.mark} | (environment or {}),
            )

    def wait_ready(self):
        def ready():
            assert self.process.poll() is None, self.log.read_text()
            return "block forever" in self.log.read_text()

        wait_for(ready, START_LIMIT_S, lambda: self.log.read_text())

    def find(self, text):
        """Processes of this node whose command line has the text."""
        return [process for process, words in marked(self.mark).items() if text in " ".join(words)]

    def ours(self):
        """What `tessera` has running here: processes and their command lines."""
        return {p: words for p, words in marked(self.mark).items() if words[0].endswith(("tessera",))}

    def ranks(self):
        """{rank: process}"""
        return {int(words[2]): process for process, words in self.ours().items() if words[1] == "rank"}

    def clean(self):
        for _ in range(100):  # new ones may be born meanwhile
            left = [process for process in marked(self.mark)]
            for process in left:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            self.process.poll()
            if not left:
                return
            time.sleep(0.05)


class Cluster:
    def __init__(self, ray, folder, hosts):
        self.ray, self.folder, self.hosts = ray, folder, hosts
        self.head = f"{hosts[0].address}:{PORT}"
        self.hidden = folder / "only-here"  # a folder that the second node does not see
        self.hidden.mkdir()
        self.nodes = []

    def environment(self):
        """Of a shell on the first node."""
        return {"RAY_ADDRESS": self.head, "PATH": f"{self.ray}:{os.environ['PATH']}"}

    def start(self):
        self.nodes = [Node(self.ray, self.folder, self.hosts[0], None)]
        self.nodes[0].wait_ready()
        self.join()

    def join(self):
        """The second node, again where it has died."""
        self.nodes[1:] = [Node(self.ray, self.folder, self.hosts[1], self.head, hidden=self.hidden)]
        self.nodes[1].wait_ready()
        wait_for(lambda: "/16.0 NPU" in self.status(), 30, self.status)

    def restart(self):
        self.clean()
        self.start()

    def status(self):
        words = self.hosts[0].command(self.ray / "ray", "status")
        return subprocess.run(
            words, capture_output=True, text=True, timeout=60, env=os.environ | self.environment()
        ).stdout

    def wait_free(self):
        """Nothing of ours runs on any node and every NPU is free again."""
        wait_for(
            lambda: not any(node.ours() for node in self.nodes),
            10,
            lambda: [node.ours() for node in self.nodes],
        )
        wait_for(lambda: "0.0/16.0 NPU" in self.status(), 15, self.status)

    def ranks(self):
        found = {}
        for node in self.nodes:
            found |= node.ranks()
        return found

    def clean(self):
        for node in reversed(self.nodes):
            node.clean()
        self.nodes = []
