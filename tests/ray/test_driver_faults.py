"""What `serve` makes of a Ray driver's answers: a stand-in for the interpreter plays the driver."""

import hashlib
import json
import os

import pytest
from launch import BINARY, ROOT, SMALL, Launcher
from questions import ask, assert_same

TP2 = (*SMALL, "-tp", "2", "--distributed-executor-backend=ray")
PLAYER = """#!/usr/bin/python3
import json, os, socket, subprocess, sys
if sys.argv[1] == "-c":  # does it import ray?
    sys.exit(0)
link = socket.socket(fileno=int(sys.argv[2]))
out = link.makefile("w")
script = json.loads(os.environ["TESSERA_TEST_PLAY"])
for line in link.makefile():
    request = json.loads(line)
    if request["do"] == "stop":
        break
    for answer in script.get(request["do"], []):
        if answer == "die":
            sys.exit("the driver's last words")
        if answer == "run":  # as agents do, on this host
            inside, lifeline = os.pipe()
            for command in request["commands"]:
                env = os.environ | {name: text for name, text in request["set"].items() if text}
                env["TESSERA_LIFELINE"] = str(inside)
                subprocess.Popen(command, env=env, pass_fds=[inside])
            continue
        out.write((answer if isinstance(answer, str) else json.dumps(answer)) + "\\n")
        out.flush()
"""
CONNECTED = {
    "event": "connected",
    "cluster": "c",
    "address": "127.0.0.1",
    "ray": "9",
    "python": "3.9",
    "nodes": [],
}


@pytest.fixture
def play(tmp_path):
    """Starts `serve` with a driver that answers by the script."""
    player = tmp_path / "python3"
    player.write_text(PLAYER)
    player.chmod(0o755)
    launcher = Launcher(tmp_path)

    def start(**script):
        env = {
            "TESSERA_RAY_PYTHON": str(player),
            "TESSERA_TEST_PLAY": json.dumps({"connect": [CONNECTED]} | script),
        }
        return launcher(*TP2, env=env)

    yield start
    launcher.clean()


def node(first, count, address="127.0.0.1", **changes):
    digest = hashlib.sha256(BINARY.read_bytes()).hexdigest()
    probe = {"cores": 2, "memory": 8 << 30, "python": "3.9", "binary": digest, "version": "v", "model": True}
    return {"address": address, "host": "h", "first": first, "count": count, "probe": probe | changes}


def placed(*nodes):
    return [{"event": "placed", "resource": "NPU", "amount": 1, "nodes": nodes}]


def refused(program, *texts):
    assert program.wait(30) == 1, program.text()
    for text in texts:
        assert text in program.text(), program.text()


def test_nodes_that_differ_are_named_together(play):
    program = play(
        reserve=placed(
            node(0, 1, "10.0.0.1", binary="ab" * 32, version="tessera 9", python="3.7"),
            node(1, 1, "10.0.0.2", binary="", model=False),
        )
    )
    refused(
        program,
        "10.0.0.1 (h) has another program at",
        "tessera 9, SHA-256 abababababab; here",
        "10.0.0.1 (h) runs Python 3.7; here 3.9",
        f"10.0.0.2 (h) has no model at {ROOT}/models/tiny-r1",
        "10.0.0.2 (h) has no program at",
    )


def test_machines_that_differ_are_warned_about(play, reference):
    """And serve all the same: here the driver runs the nodes' commands, without Ray."""
    starts = [{"event": "started", "node": number, "process": 1, "notes": ["niced"]} for number in (0, 1)]
    nodes = (node(0, 1, cores=4, monitor=True), node(1, 1, memory=2 << 30, monitor=False))
    program = play(reserve=placed(*nodes), start=["run", *starts]).wait_ready()
    for text in (
        "different numbers of cores: 2, 4",
        "different amounts of memory: 2 GiB",
        "RAY_memory_monitor_refresh_ms=0",
        "127.0.0.1: niced",
    ):
        assert text in program.text(), program.text()
    assert_same({"long": ask(program, "long")}, {"long": reference["long"]})
    assert program.stop() == 0


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ({"connect": ["die"]}, "the Ray driver has ended; its last words: the driver's last words"),
        ({"reserve": ["die"]}, "the Ray driver has ended"),
        ({"reserve": placed(node(0, 2)), "start": ["die"]}, "the Ray driver has ended"),
        ({"connect": [{"event": "failed", "text": "no cluster here"}]}, "no cluster here"),
        ({"connect": [{"event": "placed"}]}, "the Ray driver says 'placed' where 'connected' is wanted"),
        ({"reserve": placed(node(0, 1))}, "the Ray driver places 1 ranks"),
        ({"reserve": placed(node(1, 2))}, "the Ray driver places rank 1 where 0 is wanted"),
        ({"reserve": placed(node(0, 2), node(2, 0))}, "places rank 2 where 2 is wanted"),
        ({"reserve": [{"event": "placed"}]}, "the Ray driver names no nodes"),
        (
            {
                "reserve": placed(node(0, 2)),
                "start": [
                    {"event": "started", "node": 0, "process": 1},
                    {"event": "exited", "node": 0, "code": 2, "tail": ["first", "last"]},
                ],
            },
            "on 127.0.0.1 (h) exited with code 2; its last words: first | last",
        ),
        (
            {
                "reserve": placed(node(0, 2)),
                "start": [
                    "no JSON, which is passed over",
                    {"event": "started", "node": 0, "process": 1},
                    {"event": "lost", "node": 0, "text": "ActorDiedError"},
                ],
            },
            "Ray has lost the agent on 127.0.0.1 (h): ActorDiedError",
        ),
    ],
)
def test_what_goes_wrong_is_said(play, script, text):
    refused(play(**script), text)


def test_an_interpreter_without_ray(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    launcher = Launcher(tmp_path)
    try:
        refused(launcher(*TP2, "--ray-python", python), "does not import ray; wanted one that imports ray")
        moved = {"PATH": str(tmp_path)}
        if not os.path.exists(ROOT / "build/ray/bin/python3"):
            refused(launcher(*TP2, env=moved), "Ray is not installed", "./dev deps --ray")
    finally:
        launcher.clean()
