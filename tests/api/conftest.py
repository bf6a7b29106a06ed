"""Fixtures of the API tests: one real server of models/tiny-r1 on a free port. No test lives here."""
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = pathlib.Path(os.environ.get("TESSERA_BUILD", ROOT / "build/release")) / "tessera"
START_LIMIT_S = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running `tessera serve`; `port` is where it listens."""

    def __init__(self, arguments, folder):
        self.port = free_port()
        self.log = folder / f"server-{self.port}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [BINARY, "serve", "models/tiny-r1", "--port", str(self.port), *arguments], cwd=ROOT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START_LIMIT_S
        while self.status("/health") != 200:
            alive = self.process.poll() is None and time.monotonic() < end
            assert alive, self.log.read_text(errors="replace")
            time.sleep(0.05)  # nothing to wait on: the port is closed until the model is loaded

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def status(self, path):
        try:
            return urllib.request.urlopen(self.url(path), timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def post(self, path, body):
        request = urllib.request.Request(self.url(path), json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))

    def metrics(self):
        """{name without labels: sum over labels}"""
        text = urllib.request.urlopen(self.url("/metrics"), timeout=10).read().decode()
        values = {}
        for line in text.splitlines():
            if found := re.match(r"([a-z_A-Z:]+)(?:\{.*\})? (\S+)$", line):
                values[found[1]] = values.get(found[1], 0) + float(found[2])
        return values

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@contextlib.contextmanager
def running(folder, *arguments):
    server = Server(arguments, folder)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The server that most tests share; its names are models/tiny-r1 and tiny-r1."""
    folder = tmp_path_factory.mktemp("server")
    with running(folder, "--served-model-name", "models/tiny-r1", "tiny-r1") as one:
        yield one


@pytest.fixture(scope="session")
def guarded_server(tmp_path_factory):
    """With an API key and the optional endpoints."""
    folder = tmp_path_factory.mktemp("guarded")
    with running(folder, "--api-key", "secret", "--enable-tokenizer-info-endpoint",
                 "--enable-request-id-headers", "--enable-prompt-tokens-details") as one:
        yield one
