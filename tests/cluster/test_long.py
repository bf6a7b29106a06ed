"""A long mixed run on DP2TP2 leaves nothing behind. TESSERA_LONG=1 makes it ten times as long."""

import concurrent.futures
import os
import pathlib
import random

from launch import SMALL, wait_for
from questions import LONG, ask, assert_same, leave_early, questions

REQUESTS = 10_000 if os.environ.get("TESSERA_LONG") == "1" else 1_000
CLIENTS = 16


def state(program):
    """{process: (descriptors, kibibytes in use)}"""
    found = {}
    for process in program.processes():
        folder = pathlib.Path(f"/proc/{process}")
        kib = next(
            int(line.split()[1])
            for line in (folder / "status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
        found[process] = (len(list((folder / "fd").iterdir())), kib)
    return found


def small_request(program, seed):
    chance = random.Random(seed)
    body = {"prompt": LONG[: chance.randint(1, 40)], "max_tokens": chance.randint(1, 6), "seed": seed}
    body |= chance.choice([{"temperature": 0}, {"temperature": 1}, {"temperature": 1, "n": 2}])
    status, answer = program.call("/v1/completions", body)
    assert status == 200, answer


def load(program, reference, count, seed):
    """`count` requests: most are small, some are questions with a known answer, some leave."""
    names = list(questions())

    def one(number):
        kind = number % 10
        if kind == 3:
            leave_early(program, seed + number)
        elif number % 50 == 7:
            name = names[number // 50 % len(names)]
            assert_same({name: ask(program, name)}, {name: reference[name]})
        else:
            small_request(program, seed + number)

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for _ in pool.map(one, range(count)):
            pass


def idle(program):
    return not any(
        program.total(name)
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    )


def test_nothing_is_left(launch, reference):
    program = launch(
        *SMALL,
        "-dp",
        "2",
        "-tp",
        "2",
        "--max-num-batched-tokens",
        "64",
        "--max-num-seqs",
        "16",
        "--num-gpu-blocks-override",
        "96",
    ).wait_ready()
    load(program, reference, 150, seed=1)
    wait_for(lambda: idle(program), 20, "requests are left")
    before = wait_for(lambda: quiet(program), 10, lambda: f"sockets are left: {state(program)}")
    load(program, reference, REQUESTS, seed=1_000_000)
    wait_for(lambda: idle(program), 20, "requests are left")
    wait_for(
        lambda: sorted(descriptors(program).items()) == sorted(descriptors_of(before).items()),
        10,
        lambda: f"descriptors: before {before}, now {state(program)}",
    )
    after = state(program)
    assert sorted(after) == sorted(before)  # the same processes
    for process, (_, kib) in after.items():
        assert (
            kib - before[process][1] < 16 * 1024
        ), f"process {process} grew: {before[process]}, {after[process]}"
    groups = {
        labels["engine"]: value
        for name, labels, value in program.metrics()
        if name == "vllm:generation_tokens_total"
    }
    assert sorted(groups) == ["0", "1"] and min(groups.values()) > 0.2 * max(groups.values()), groups
    assert program.stop() == 0


def descriptors_of(found):
    return {process: count for process, (count, _) in found.items()}


def descriptors(program):
    return descriptors_of(state(program))


def quiet(program):
    """The state, when two looks see the same number of descriptors."""
    first = state(program)
    return first if descriptors(program) == descriptors_of(first) else None
