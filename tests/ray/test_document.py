"""docs/tutorial.md: every command in it is run here, with the embedded model in place of R1."""

import json
import os
import re
import shlex
import subprocess

import pytest
from launch import BINARY, MODEL, ROOT, Launcher, network, wait_for
from questions import ask_all, assert_same

DOCUMENT = (ROOT / "docs/tutorial.md").read_text()
R1 = "/path/to/save/deepseek_r1_w8a8"
YAMLS = {"TP16": "predict_tiny_r1_w8a8.yaml", "DP4": "predict_tiny_r1_w8a8_ep4tp4.yaml"}


def commands(begin):
    """The document's commands that begin so, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(begin)]
    return [shlex.split(line.replace(R1, MODEL)) for line in lines]


def served(words):
    """The arguments of `vllm-mindspore serve`, which is a name of the binary."""
    assert words[:2] == ["vllm-mindspore", "serve"]
    assert os.path.samefile(BINARY.parent / "vllm-mindspore", BINARY)
    return words[2:]


def exported(yaml):
    """The variables of the document; the YAML is that of the embedded model."""
    found = {}
    for words in commands("export "):
        found |= dict(word.split("=", 1) for word in words[1:] if not word.startswith("PATH="))
    found.pop("ASCEND_RT_VISIBLE_DEVICES") if yaml == YAMLS["DP4"] else None
    return found | {"MINDFORMERS_MODEL_CONFIG": str(ROOT / "tests/yaml" / yaml)}


def curl(host):
    """What the document's request gives."""
    (words,) = commands("curl ")
    done = subprocess.run(host.command(*words), capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["usage"]["completion_tokens"] == 20, answer
    return answer["choices"][0]["text"]


def test_every_command_is_known():
    """One that no test below runs would not be noticed otherwise."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    begins = {" ".join(line.split()[:2]) for block in blocks for line in block.splitlines()}
    exports = {begin for begin in begins if begin.startswith("export ")}
    serving = {"vllm-mindspore serve", "curl http://localhost:8000/v1/completions"}
    assert begins - exports == {"./dev build", "./dev deps", "ray start"} | serving


def test_tp16(cluster, serve, reference):
    head, worker = commands("ray start")
    assert set(head[1:]) <= set(map(str, cluster.nodes[0].words)), "the document starts another head"
    assert set(worker[1:]) <= set(map(str, cluster.nodes[1].words)), "the document starts another worker"
    assert "0.0/16.0 NPU" in cluster.status()
    (words,) = [
        words for words in commands("vllm-mindspore") if "--distributed-executor-backend=ray" in words
    ]
    program = serve(*served(words), model=None, env=exported(YAMLS["TP16"])).wait_ready(120)
    assert program.port == 8000
    for number, node in enumerate(cluster.nodes):
        assert sorted(node.ranks()) == list(range(8 * number, 8 * number + 8))
        assert f"ranks {8 * number} to {8 * number + 7} on {node.host.address}" in program.text()
    wait_for(lambda: "16.0 reserved in placement groups" in cluster.status(), 10, cluster.status)
    for line in re.findall(r"^[IW] (?!ranks)(.*)$", DOCUMENT, re.MULTILINE):
        assert line in program.text(), line
    assert "memory monitor" not in program.text() and "nice" not in program.text()
    assert curl(cluster.hosts[0]) == reference["greedy"]["choices"][0]["text"]
    assert_same(ask_all(program), reference)
    assert program.stop() == 0
    cluster.wait_free()


@pytest.mark.usefixtures("cluster")  # where namespaces can be made
def test_dp4tp4ep4(tmp_path, reference):
    first, second = [
        words for words in commands("vllm-mindspore") if "--distributed-executor-backend=ray" not in words
    ]
    launcher = Launcher(tmp_path)
    with network(["192.10.10.10", "192.10.10.11"], "enp189s0f0") as hosts:
        try:
            env = exported(YAMLS["DP4"]) | {"TESSERA_CLUSTER_SECRET": "s"}
            worker = launcher(*served(second), model=None, host=hosts[1], env=env)
            head = launcher(*served(first), model=None, host=hosts[0], env=env).wait_ready(120)
            assert curl(hosts[0]) == reference["greedy"]["choices"][0]["text"]
            assert head.stop() == 0 and worker.wait() == 0
        finally:
            launcher.clean()
