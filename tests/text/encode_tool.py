"""Talks to the program encode_tool (see encode_tool.cc) in $TESSERA_BUILD."""

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY_R1 = ROOT / "models" / "tiny-r1"


def program():
    build = pathlib.Path(os.environ.get("TESSERA_BUILD", ROOT / "build" / "release"))
    return build / "tests" / "text" / "encode_tool"


def ask(folder, requests):
    """One answer per request."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    run = subprocess.run([program(), folder], input=lines.encode(), capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr.decode()
    answers = [json.loads(line) for line in run.stdout.decode().split("\n")[:-1]]
    assert len(answers) == len(requests)
    return answers
