"""Programs under test: where they run, how they start, what they leave behind. No test lives here.

A host is this machine or a network namespace of it. Every program carries a mark in its environment, which
its ranks inherit: whatever is left of it can be found and ended, and nothing else is ever touched.
"""

import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import re
import selectors
import signal
import socket
import subprocess
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = pathlib.Path(os.environ.get("TESSERA_BUILD", ROOT / "build/release")) / "tessera"
MODEL = "models/tiny-r1"
SMALL = ("--max-model-len", "512", "--block-size", "32", "--port", "0")
START_LIMIT_S = 90  # of a world whose ranks share few cores
END_LIMIT_S = 20
CLONE_NEWNET = 0x40000000


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, limit_s, what):
    """The first true value of condition(); fails after the limit."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < end, f"after {limit_s} s: {what() if callable(what) else what}"
        time.sleep(0.02)  # other processes: there is nothing to wait on
    return value


# -- Hosts


class Host:
    """Where programs run: this machine, or a namespace with the address `address` on `interface`."""

    def __init__(self, namespace="", address="127.0.0.1", interface="lo"):
        self.namespace, self.address, self.interface = namespace, address, interface

    def command(self, *arguments):
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *map(str, arguments)]

    def connect(self, port, timeout=60):
        """A connection to loopback, made inside: a socket stays in the namespace of its birth."""
        with self.entered():
            return socket.create_connection(("127.0.0.1", port), timeout)

    @contextlib.contextmanager
    def entered(self):
        if not self.namespace:
            yield
            return
        enter = ctypes.CDLL(None, use_errno=True).setns
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.namespace}") as inside:
            assert enter(inside.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert enter(before.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def listeners(self, processes):
        """{process: [address]} of what listens, as ss shows it."""
        lines = subprocess.run(
            self.command("ss", "-tlnpH"), capture_output=True, text=True, check=True
        ).stdout
        found = {}
        for line in lines.splitlines():
            for process in map(int, re.findall(r"pid=(\d+)", line)):
                if process in processes:
                    found.setdefault(process, []).append(line.split()[3])
        return found


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def why_no_namespaces():
    """Empty, or why this machine cannot make them."""
    name = f"tessera-{os.getpid()}-try"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if done.returncode == 0:
            done = subprocess.run(
                ["ip", "-n", name, "link", "add", "bridge", "type", "bridge"], capture_output=True, text=True
            )
            subprocess.run(["ip", "netns", "del", name])
        return done.stderr.strip() and f"no network namespaces: {done.stderr.strip()}"
    except OSError as error:
        return f"no network namespaces: ip: {error.strerror}"


@contextlib.contextmanager
def network(addresses, interface):
    """Hosts with those addresses, each in a namespace, on one bridge in a namespace of its own."""
    stem = f"tessera-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    switch, names = f"{stem}-s", []
    try:
        names.append(switch)
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for number, address in enumerate(addresses):
            name, port = f"{stem}-{number}", f"port{number}"
            names.append(name)
            ip("netns", "add", name)
            ip("link", "add", interface, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
            hosts.append(Host(name, address, interface))
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# -- Programs


class Streamed(Exception):
    """The server ended a stream with an error event; `args[0]` is the error."""


class Stream:
    """A streamed answer; iterating gives its events as JSON."""

    def __init__(self, program, path, body):
        self.connection = http.client.HTTPConnection("127.0.0.1")
        self.connection.sock = program.host.connect(program.port)
        self.connection.request(
            "POST", path, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
        )
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.read()
        self.done = False

    def __iter__(self):
        for line in self.answer:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                self.done = True
                return
            event = json.loads(line[6:])
            if "error" in event:
                raise Streamed(event["error"])
            yield event

    def close(self):
        # Both, or the descriptor stays open for the answer.
        self.answer.close()
        self.connection.close()


class Program:
    """A `tessera serve`, head or headless, with its ranks."""

    def __init__(self, folder, *arguments, host=None, env=None, model=MODEL):
        self.host = host or Host()
        self.mark = uuid.uuid4().hex
        self.port = 0
        self.log = folder / f"serve-{self.mark[:8]}.log"
        self.words = list(map(str, arguments))
        command = self.host.command(BINARY, "serve", *([model] if model else []), *arguments)
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("TESSERA_", "MIND"))
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean | {"TESSERA_TEST_MARK": self.mark} | (env or {}),
            )

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_ready(self, limit_s=START_LIMIT_S):
        """Until it says how to call it; its last line on stdout."""
        said, end = b"", time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not (found := re.search(rb"curl http://127\.0\.0\.1:(\d+)/[^\n]*\n", said)):
                assert selector.select(max(0, end - time.monotonic())), f"not ready in time:\n{self.text()}"
                some = os.read(self.process.stdout.fileno(), 4096)
                assert some, f"it ended with {self.process.wait(END_LIMIT_S)}:\n{self.text()}"
                said += some
        self.port = int(found[1])
        return self

    def call(self, path, body=None, timeout=60):
        """(status, JSON or text of the answer); status 0 where nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1")
        try:
            connection.sock = self.host.connect(self.port, timeout)
            connection.request(
                "GET" if body is None else "POST",
                path,
                body and json.dumps(body),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except json.JSONDecodeError:
            return answer.status, text

    def stream(self, body, path="/v1/completions"):
        return Stream(self, path, body)

    def metrics(self):
        """[(name, {label: value}, value)]"""
        status, text = self.call("/metrics")
        assert status == 200, text
        found = []
        for line in text.splitlines():
            if parts := re.fullmatch(r"([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)", line):
                found.append(
                    (parts[1], dict(re.findall(r'(\w+)="([^"]*)"', parts[2] or "")), float(parts[3]))
                )
        return found

    def total(self, name):
        return sum(value for found, _, value in self.metrics() if found == name)

    def processes(self):
        """Ids of all living processes with this program's mark."""
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if f"TESSERA_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def ranks(self):
        """{rank: process}, by their command lines."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
                if words[:2] == ["tessera", "rank"]:
                    assert words[3] == "dp" and words[5] == "tp", words
                    found[int(words[2])] = process
        return found

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, limit_s=END_LIMIT_S):
        """The exit code; nothing of the program is left."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {limit_s} s:\n{self.text()}") from None
        wait_for(lambda: not self.processes(), 5, lambda: f"left behind: {self.ranks()}\n{self.text()}")
        return code

    def stop(self, limit_s=END_LIMIT_S):
        self.signal(signal.SIGTERM)
        return self.wait(limit_s)

    def clean(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        self.process.stdout.close()


class Launcher:
    """Starts programs, and ends what is left of them."""

    def __init__(self, folder):
        self.folder, self.programs = folder, []

    def __call__(self, *arguments, **options):
        self.programs.append(Program(self.folder, *arguments, **options))
        return self.programs[-1]

    def clean(self):
        for program in self.programs:
            program.clean()
