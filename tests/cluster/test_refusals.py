"""What does not fit is refused: at once, on both sides, with both values."""

import shutil
import socket
import time

import pytest
from launch import MODEL, ROOT, SMALL, free_port, wait_for

LIMIT_S = 5
FLAGS = {
    "--data-parallel-size": "2",
    "--tensor-parallel-size": "2",
    "--data-parallel-size-local": "1",
    "--additional-config.expert_parallel": "4",
    "--max-model-len": "512",
    "--block-size": "32",
    "--max-num-batched-tokens": "64",
    "--max-num-seqs": "16",
}


def words(flags):
    return [word for pair in flags.items() for word in pair] + ["--enable-expert-parallel", "--port", "0"]


def start(launch, worker_flags, model=MODEL, head_env=None, worker_env=None):
    where = {"--data-parallel-rpc-port": str(free_port())}
    head = launch(*words(FLAGS | where), env=head_env)
    wait_for(lambda: "waiting on" in head.text(), 20, head.text)
    begin = time.monotonic()
    worker = launch(
        *words({"--data-parallel-start-rank": "1"} | FLAGS | where | worker_flags),
        "--headless",
        model=model,
        env=worker_env,
    )
    return head, worker, begin


@pytest.mark.parametrize(
    "flags, values",
    [
        ({"--tensor-parallel-size": "4"}, ("2", "4")),
        ({"--data-parallel-size": "4"}, ("2", "4")),
        ({"--additional-config.expert_parallel": "2"}, ("4", "2")),
        ({"--max-model-len": "1024"}, ("512", "1024")),
        ({"--block-size": "64"}, ("32", "64")),
        ({"--max-num-batched-tokens": "128"}, ("64", "128")),
        ({"--max-num-seqs": "17"}, ("16", "17")),
    ],
    ids=lambda value: next(iter(value)).strip("-") if isinstance(value, dict) else "",
)
def test_other_flags(launch, flags, values):
    head, worker, begin = start(launch, flags)
    name = next(iter(flags)).split(".")[0]
    name = "expert parallel size" if name == "--additional-config" else name
    assert worker.wait(LIMIT_S + 5) == 1 and head.wait(LIMIT_S + 5) == 1
    assert time.monotonic() - begin < LIMIT_S
    for program in (head, worker):
        line = next(line for line in program.text().splitlines() if "refuse" in line)
        assert name in line and all(value in line for value in values), line


def test_other_content(launch, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / MODEL, copy)
    weights = copy / "quant_model_weight_w8a8_dynamic.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    head, worker, begin = start(launch, {}, model=copy)
    assert worker.wait(LIMIT_S + 5) == 1 and head.wait(LIMIT_S + 5) == 1
    assert time.monotonic() - begin < LIMIT_S
    for program in (head, worker):
        assert "model content" in next(line for line in program.text().splitlines() if "refuse" in line)


def test_same_content_elsewhere(launch, tmp_path):
    """Paths, ports and --trust-remote-code are of a host."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / MODEL, copy)
    head, worker, _ = start(launch, {}, model=copy)
    head.wait_ready()
    assert head.stop() == 0 and worker.wait() == 0


def secrets(tmp_path, which, value):
    """(flags, environment) that give the secret."""
    if which == "variable":
        return (), {"TESSERA_CLUSTER_SECRET": value}
    path = tmp_path / f"secret-{value}"
    path.write_text(value + "\n")
    path.chmod(0o600)
    return ("--cluster-secret-file", path), {}


@pytest.mark.parametrize("wrong", ["other", "none"])
@pytest.mark.parametrize("which", ["variable", "file"])
def test_wrong_secret(launch, tmp_path, which, wrong):
    """The stranger is refused, the head waits on, the right one joins."""
    where = {"--data-parallel-rpc-port": str(free_port())}
    flags, env = secrets(tmp_path, which, "right")
    other_flags, other_env = secrets(tmp_path, which, "other") if wrong == "other" else ((), {})
    head = launch(*words(FLAGS | where), *flags, env=env)
    wait_for(lambda: "waiting on" in head.text(), 20, head.text)
    of_worker = words(FLAGS | where | {"--data-parallel-start-rank": "1"})
    begin = time.monotonic()
    stranger = launch(*of_worker, "--headless", *other_flags, env=other_env)
    assert stranger.wait(LIMIT_S + 5) == 1
    assert time.monotonic() - begin < LIMIT_S
    assert "secret" in stranger.text()
    wait_for(lambda: "refused" in head.text(), LIMIT_S, head.text)
    assert "secret" in head.text() and "right" not in head.text()
    worker = launch(*of_worker, "--headless", *flags, env=env)
    head.wait_ready()
    assert head.call("/v1/completions", {"prompt": "I am", "max_tokens": 3})[0] == 200
    assert head.stop() == 0 and worker.wait() == 0


def test_strangers_on_the_port(launch):
    """Who connects and says nothing, or nonsense, or goes, keeps no right worker out."""
    port = free_port()
    where = {"--data-parallel-rpc-port": str(port)}
    env = {"TESSERA_CLUSTER_SECRET": "s"}
    head = launch(*words(FLAGS | where), env=env)
    wait_for(lambda: "waiting on" in head.text(), 20, head.text)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[1].sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
    strangers[2].close()
    worker = launch(*words(FLAGS | where | {"--data-parallel-start-rank": "1"}), "--headless", env=env)
    head.wait_ready()
    for stranger in strangers:
        stranger.close()
    assert head.stop() == 0 and worker.wait() == 0


def test_worker_that_left_may_come_again(launch):
    """Of two workers one joins and dies before the other has come: the head must not wait for ever."""
    flags = FLAGS | {"--data-parallel-size": "4", "--data-parallel-rpc-port": str(free_port())}
    head = launch(*words(flags))
    first = launch(*words(flags | {"--data-parallel-start-rank": "1"}), "--headless")
    wait_for(lambda: "brings rank" in head.text(), 20, head.text)
    first.process.kill()
    first.wait()
    rest = [
        launch(*words(flags | {"--data-parallel-start-rank": str(group)}), "--headless") for group in (2, 3)
    ]
    begin = time.monotonic()
    code = head.wait(30)  # it cannot start without them: an end that says so
    assert code == 1 and time.monotonic() - begin < 20
    assert "rank" in head.text().splitlines()[-1]
    assert all(worker.wait() == 1 for worker in rest)


@pytest.mark.parametrize("start_rank, words_of_head", [("0", "head runs"), ("1", "another node")])
def test_ranks_that_are_taken(launch, start_rank, words_of_head):
    flags = FLAGS | {"--data-parallel-size": "4", "--data-parallel-rpc-port": str(free_port())}
    head = launch(*words(flags))
    first = launch(*words(flags | {"--data-parallel-start-rank": "1"}), "--headless")
    wait_for(lambda: "brings rank" in head.text(), 20, head.text)
    begin = time.monotonic()
    second = launch(*words(flags | {"--data-parallel-start-rank": start_rank}), "--headless")
    assert [second.wait(10), first.wait(10), head.wait(10)] == [1, 1, 1]
    assert time.monotonic() - begin < LIMIT_S
    for program in (head, second):
        assert words_of_head in program.text() and f"rank {2 * int(start_rank)}" in program.text()


def test_groups_out_of_range(launch):
    program = launch(*words(FLAGS | {"--data-parallel-start-rank": "2"}), "--headless")
    assert program.wait(LIMIT_S) in (1, 2)
    assert "2" in program.text() and "--data-parallel-start-rank" in program.text()


@pytest.mark.parametrize(
    "flags, numbers",
    [
        (("-tp", "3"), ("3", "16")),
        (("-tp", "32"), ("32", "16")),
        (("-dp", "5", "--enable-expert-parallel"), ("5", "16")),
        (("-tp", "2", "--enable-expert-parallel", "--additional-config.expert_parallel", "4"), ("4", "2")),
        (("-dp", "3", "-tp", "2", "--enable-expert-parallel", "--additional-config.expert_parallel", "6"),
         ("6", "16")),
        (("-tp", "4", "--nnodes", "3", "--node-rank", "0"), ("3", "4")),
    ],
    ids=["tp3", "tp32", "ep5", "ep4 of 2 ranks", "ep6", "nnodes3"],
)  # fmt: skip
def test_layouts_that_do_not_fit(launch, flags, numbers):
    program = launch(*SMALL, *flags)
    assert program.wait(LIMIT_S) in (1, 2)
    assert all(number in program.text() for number in numbers), program.text()
