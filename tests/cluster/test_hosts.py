"""Hosts with own addresses: the tutorial's commands, word for word but for the model, and --nnodes."""

import signal

import pytest
from launch import MODEL, ROOT, SMALL, wait_for
from questions import ask, ask_all, assert_same

# Where the control port is that the tutorial names.
ADDRESS, PORT = "192.10.10.10", 12370
YAML = ROOT / "tests/yaml/predict_tiny_r1_w8a8_ep4tp4.yaml"
SECRET = {"TESSERA_CLUSTER_SECRET": "known to these hosts only"}
DP4TP4EP4 = [
    "--trust-remote-code", "--max-num-seqs=256", "--max-model-len=32768", "--max-num-batched-tokens=4096",
    "--block-size=128", "--gpu-memory-utilization=0.9", "--tensor-parallel-size", "4",
    "--data-parallel-size", "4", "--data-parallel-size-local", "2", "--data-parallel-address", ADDRESS,
    "--data-parallel-rpc-port", str(PORT), "--enable-expert-parallel",
]  # fmt: skip


def interface_of(host):
    """The network variables of the tutorial."""
    return {name: host.interface for name in ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")}


def check_listeners(programs):
    """Once all have joined nobody listens but the API, on its own address: not to nodes, not to ranks."""
    for program in programs:
        wanted = {program.process.pid: [f"127.0.0.1:{program.port}"]} if program.port else {}
        assert program.host.listeners(set(program.processes())) == wanted, program.words


def check_world(head, workers, world):
    up = {
        int(labels["rank"]): labels
        for name, labels, value in head.metrics()
        if name == "tessera:rank_up" and value == 1
    }
    assert sorted(up) == list(range(world))
    ranks = {}
    for program in (head, *workers):
        ranks |= program.ranks()
    assert {rank: int(labels["pid"]) for rank, labels in up.items()} == ranks
    assert len({labels["node"] for labels in up.values()}) == 1 + len(workers)
    assert head.total("tessera:collective_wire_bytes_total") > 0


def check_end(head, workers, limit_s=30):
    head.signal(signal.SIGTERM)
    assert head.wait(limit_s) == 0
    assert [worker.wait() for worker in workers] == [0] * len(workers)


def test_tutorial_dp4tp4ep4(launch, two_hosts, reference):
    """The worker starts first; the port of the API is the default one, in a namespace of its own."""
    first, second = two_hosts
    env = SECRET | {"MINDFORMERS_MODEL_CONFIG": str(YAML), "VLLM_MS_MODEL_BACKEND": "MindFormers"}
    worker = launch(
        f"--model={MODEL}",
        *DP4TP4EP4,
        "--headless",
        "--data-parallel-start-rank",
        "2",
        model=None,
        host=second,
        env=env | interface_of(second),
    )
    head = launch(
        f"--model={MODEL}",
        *DP4TP4EP4,
        "--data-parallel-start-rank",
        "0",
        model=None,
        host=first,
        env=env | interface_of(first),
    ).wait_ready()
    assert head.port == 8000
    assert sorted(head.ranks()) == list(range(8)) and sorted(worker.ranks()) == list(range(8, 16))
    assert_same(ask_all(head), reference)
    check_world(head, [worker], 16)
    check_listeners([head, worker])
    check_end(head, [worker])


@pytest.mark.parametrize(
    "layout",
    [("-tp", "16"), ("-dp", "4", "-tp", "4", "--enable-expert-parallel")],
    ids=["tp16", "dp4tp4ep16"],
)
def test_four_hosts(launch, four_hosts, reference, layout):
    """A quarter of the ranks on each; of tp16, every host holds a part of the only group."""
    programs = []
    flags = (
        *SMALL,
        *layout,
        "--max-num-batched-tokens",
        "8",
        "--max-num-seqs",
        "8",
        "--nnodes",
        "4",
        "--master-addr",
        ADDRESS,
        "--distributed-executor-backend",
        "mp",
    )
    for number in (2, 0, 3, 1):
        host = four_hosts[number]
        programs.append(launch(*flags, "--node-rank", number, host=host, env=SECRET | interface_of(host)))
    head = programs.pop(1).wait_ready()
    assert_same(ask_all(head, seed=4), reference)
    check_world(head, programs, 16)
    check_listeners([head, *programs])
    check_end(head, programs)


def test_tp16_on_two_hosts_by_nnodes(launch, two_hosts, reference):
    flags = (*SMALL, "-tp", "16", "--nnodes", "2", "--master-addr", ADDRESS, "--master-port", PORT)
    head, worker = (
        launch(*flags, "--node-rank", number, host=host, env=SECRET | interface_of(host))
        for number, host in enumerate(two_hosts)
    )
    head.wait_ready()
    assert_same(ask_all(head, seed=2), reference)
    check_world(head, [worker], 16)
    check_listeners([head, worker])
    check_end(head, [worker])


def test_control_listener_is_on_the_named_address(launch, two_hosts):
    """While nodes are awaited; and a head that is told to stop then does."""
    flags = (*SMALL, "-tp", "2", "--nnodes", "2", "--master-addr", ADDRESS)
    head = launch(*flags, "--node-rank", "0", host=two_hosts[0], env=SECRET | interface_of(two_hosts[0]))
    wait_for(lambda: "waiting on" in head.text(), 20, head.text)
    assert two_hosts[0].listeners(set(head.processes())) == {head.process.pid: [f"{ADDRESS}:29501"]}
    assert head.stop() in (0, 1)


def test_worker_waits_for_its_head(launch, two_hosts, reference):
    """With a line every 10 seconds; the head comes, is killed, and comes again to the same port."""
    flags = (*SMALL, "-tp", "2", "--nnodes", "2", "--master-addr", ADDRESS)
    worker = launch(*flags, "--node-rank", "1", host=two_hosts[1], env=SECRET)
    wait_for(lambda: "still looking for the head" in worker.text(), 15, worker.text)
    head = launch(*flags, "--node-rank", "0", host=two_hosts[0], env=SECRET).wait_ready()
    head.signal(signal.SIGKILL)
    assert head.wait() == -signal.SIGKILL and worker.wait() == 1
    head, worker = (
        launch(*flags, "--node-rank", number, host=host, env=SECRET) for number, host in enumerate(two_hosts)
    )
    head.wait_ready()
    assert_same({"long": ask(head, "long")}, {"long": reference["long"]})
    check_end(head, [worker])


def test_without_a_secret_and_without_interfaces(launch, two_hosts, reference):
    """It works, on the named address only, and says what that means."""
    flags = (
        *SMALL,
        "-dp",
        "2",
        "-tp",
        "2",
        "--data-parallel-size-local",
        "1",
        "--data-parallel-address",
        ADDRESS,
        "--data-parallel-rpc-port",
        PORT,
    )
    head = launch(*flags, host=two_hosts[0])
    worker = launch(*flags, "--headless", "--data-parallel-start-rank", "1", host=two_hosts[1])
    head.wait_ready()
    assert_same(ask_all(head, seed=3, leavers=2), reference)
    check_world(head, [worker], 4)
    check_listeners([head, worker])
    for program in (head, worker):
        assert "no cluster secret" in program.text()
    check_end(head, [worker])


def test_head_without_ranks(launch, two_hosts, reference):
    """--data-parallel-size-local 0: an API server, all ranks elsewhere."""
    flags = (
        *SMALL,
        "-dp",
        "2",
        "-tp",
        "2",
        "--data-parallel-address",
        ADDRESS,
        "--data-parallel-rpc-port",
        PORT,
    )
    head = launch(*flags, "--data-parallel-size-local", "0", host=two_hosts[0], env=SECRET)
    worker = launch(
        *flags,
        "--data-parallel-size-local",
        "2",
        "--headless",
        "--data-parallel-start-rank",
        "0",
        host=two_hosts[1],
        env=SECRET,
    )
    head.wait_ready()
    assert sorted(worker.ranks()) == [0, 1, 2, 3] and not head.ranks()
    assert_same(ask_all(head, seed=5, leavers=2), reference)
    assert head.total("tessera:rank_up") == 4
    check_listeners([head, worker])
    check_end(head, [worker])


def test_unknown_interface_is_refused(launch, two_hosts):
    head = launch(
        *SMALL,
        "-tp",
        "2",
        "--nnodes",
        "2",
        "--master-addr",
        ADDRESS,
        host=two_hosts[0],
        env=SECRET | {"GLOO_SOCKET_IFNAME": "eth77"},
    )
    assert head.wait() in (1, 2)
    assert "eth77" in head.text() and two_hosts[0].interface in head.text()
