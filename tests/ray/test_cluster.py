"""The tutorial over a real Ray cluster of two nodes: its commands, what is refused, who dies."""

import os
import signal
import subprocess
import time

import pytest
from launch import MODEL, ROOT, SMALL, Streamed, wait_for
from questions import ask_all, assert_same

FOREVER = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 1, "seed": 1, "ignore_eos": True}
YAML = ROOT / "tests/yaml/predict_tiny_r1_w8a8_ep4tp4.yaml"


def check_gone(cluster, program, limit_s=10):
    """The server has ended with an error, and nothing of it is left on any node."""
    assert program.wait(limit_s) == 1, program.text()
    cluster.wait_free()


def test_dp4tp4_starts_with_one_command(cluster, serve, reference):
    """The YAML of the head rules, which the nodes' own shells did not have."""
    flags = ("-tp", "4", "-dp", "4", "--data-parallel-size-local", "2", "--enable-expert-parallel")
    env = {"MINDFORMERS_MODEL_CONFIG": str(YAML.relative_to(ROOT)), "VLLM_MS_MODEL_BACKEND": "MindFormers"}
    head = serve(*SMALL, *flags, "--data-parallel-backend=ray", env=env).wait_ready(120)
    assert [len(node.ranks()) for node in cluster.nodes] == [8, 8]
    assert "span" not in head.text()
    assert_same(ask_all(head), reference)
    assert head.stop() == 0
    cluster.wait_free()


def refused(program, *texts):
    assert program.wait(60) == 1, program.text()
    for text in texts:
        assert text in program.text(), program.text()


def test_not_enough_room(cluster, serve):
    program = serve(*SMALL, "-tp", "16", "-dp", "2", "--data-parallel-backend=ray", "--ray-timeout", "3")
    refused(program, "waiting for room in Ray: asked for 32 NPU (32 ranks), free are 16 of 16", "missing 16",
            "no room within 3 s (--ray-timeout)")  # fmt: skip
    program = serve(*SMALL, "-tp", "2", "--distributed-executor-backend", "ray", "--ray-resource", "FPGA",
                    "--ray-timeout", "1")  # fmt: skip
    refused(program, "asked for 2 FPGA (2 ranks), free are 0 of 0")
    cluster.wait_free()


def test_waits_until_room_is_free(cluster, serve):
    """The first server holds what the second one waits for."""
    flags = (*SMALL, "-tp", "16", "--distributed-executor-backend=ray")
    first = serve(*SMALL, "-tp", "2", "--distributed-executor-backend=ray").wait_ready()
    second = serve(*flags)
    wait_for(lambda: "missing 2" in second.text(), 30, second.text)
    assert first.stop() == 0
    second.wait_ready(120)
    assert second.stop() == 0
    cluster.wait_free()


def test_a_node_without_the_model_is_named(cluster, serve):
    subprocess.run(["cp", "-r", ROOT / MODEL, cluster.hidden / "model"], check=True)
    program = serve(*SMALL, "-tp", "16", "--distributed-executor-backend=ray", model=cluster.hidden / "model")
    refused(program, f"192.5.5.6 ({os.uname().nodename}) has no model at {cluster.hidden}/model")
    assert "192.5.5.5 (" not in program.text().split("nodes differ")[1]
    cluster.wait_free()


def test_no_cluster(serve):
    refused(serve(*SMALL, "--distributed-executor-backend=ray", env={"RAY_ADDRESS": "192.5.5.5:6380"}),
            "the Ray cluster at 192.5.5.5:6380 does not answer")  # fmt: skip
    nowhere = {"RAY_ADDRESS": "", "RAY_TMPDIR": "/dev/null"}
    refused(serve(*SMALL, "--distributed-executor-backend=ray", env=nowhere),
            "no Ray cluster on this host: run `ray start --head --port=6379`")  # fmt: skip
    refused(serve(*SMALL, "--distributed-executor-backend=ray", "--ray-python", "/bin/true/python"),
            "--ray-python: '/bin/true/python' is no program")  # fmt: skip


# -- Deaths. Each begins with a server over both nodes, which is a second start on the same cluster.


@pytest.fixture
def spread(cluster, serve):
    head = serve(
        *SMALL, "-tp", "2", "-dp", "2", "--data-parallel-size-local", "1", "--data-parallel-backend=ray"
    )
    head.wait_ready()
    assert [len(node.ranks()) for node in cluster.nodes] == [2, 2]
    return head


def check_notices(head, kill, limit_s):
    """Streams go on until one ends with an error event, within the limit after the kill. Its message."""
    stream = head.stream(FOREVER)
    next(iter(stream))
    begin = time.monotonic()
    kill()
    try:
        while time.monotonic() - begin < limit_s + 5:
            for _ in stream:
                pass
            stream.close()
            stream = head.stream(FOREVER)
    except Streamed as error:
        assert time.monotonic() - begin < limit_s, head.text()
        stream.close()
        return error.args[0]["message"]
    raise AssertionError(f"nobody noticed:\n{head.text()}")


def kill(*processes):
    for process in processes:
        os.kill(process, signal.SIGKILL)


def test_a_rank_dies(cluster, spread):
    message = check_notices(spread, lambda: kill(cluster.nodes[1].ranks()[3]), 1)
    assert "rank 3" in message and "signal 9" in message
    check_gone(cluster, spread)


def test_an_agent_dies(cluster, spread):
    check_notices(spread, lambda: kill(*cluster.nodes[1].find("ray::Agent")), 6)
    check_gone(cluster, spread)


def test_the_driver_dies(cluster, spread):
    """And with it everything that it has placed."""
    drivers = [p for p in spread.processes() if "python" in os.readlink(f"/proc/{p}/exe")]
    assert len(drivers) == 1
    check_notices(spread, lambda: kill(*drivers), 6)
    check_gone(cluster, spread)


def test_the_server_dies(cluster, spread):
    kill(spread.process.pid)
    spread.wait()
    cluster.wait_free()


def test_a_raylet_dies(cluster, spread):
    check_notices(spread, lambda: kill(*cluster.nodes[1].find("raylet/raylet")), 6)
    check_end_of_node(cluster, spread)


def test_a_node_is_stopped(cluster, spread):
    check_notices(spread, lambda: cluster.nodes[1].process.send_signal(signal.SIGTERM), 6)
    check_end_of_node(cluster, spread)


def check_end_of_node(cluster, head):
    assert head.wait(15) == 1
    wait_for(lambda: not any(node.ours() for node in cluster.nodes), 10, "something is left")
    cluster.nodes[1].clean()
    cluster.join()
    cluster.wait_free()


def test_the_head_of_ray_dies(cluster, spread):
    """Its GCS: the last test of this cluster but for a new one."""
    check_notices(spread, lambda: kill(*cluster.nodes[0].find("gcs_server")), 10)
    assert spread.wait(15) == 1
    wait_for(lambda: not any(node.ours() for node in cluster.nodes), 15, "something is left")
    cluster.restart()


def test_starts_again_on_a_new_cluster(cluster, spread, reference):
    assert_same(ask_all(spread), reference)
    assert spread.stop() == 0
    cluster.wait_free()
