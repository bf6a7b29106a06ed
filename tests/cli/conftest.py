"""Fixtures: the binary under test, and servers of it on free ports. No test lives here."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = pathlib.Path(os.environ.get("TESSERA_BUILD", ROOT / "build/release")) / "tessera"
MODEL = "models/tiny-r1"


def run(*arguments, env=None, timeout=120):
    """The finished process of one command, run in the repository's root."""
    return subprocess.run(
        [BINARY, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=os.environ | (env or {}),
    )


class Server:
    """A `tessera serve` that is ready; `port` is the one it bound."""

    def __init__(self, *arguments, env=None):
        self.process = subprocess.Popen(
            [BINARY, "serve", *map(str, arguments), "--port", "0"],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | (env or {}),
        )
        self.lines = []
        for line in self.process.stdout:  # the last line it prints is the curl to try
            self.lines.append(line)
            if found := re.search(r"curl http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise AssertionError(f"the server ended: {self.process.stderr.read()}")

    def call(self, path, body=None, headers=None):
        """(status, JSON or text of the answer)."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | (headers or {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except json.JSONDecodeError:
            return status, text

    def stop(self, number=signal.SIGTERM, timeout=60):
        """(exit code, what stood on stderr)."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(*arguments, env=None):
    server = Server(*arguments, env=env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="session")
def tiny():
    """One server of tiny-r1 for all tests that do not stop it."""
    with serving(MODEL, "--served-model-name", MODEL, "tiny-r1") as server:
        yield server
