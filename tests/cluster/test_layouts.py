"""Every layout, its ranks being processes of this machine: one answer, truthful metrics, a clean end.

Every other layout ends by the death of a rank, the rest by SIGTERM; both while answers are streamed.
"""

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest
from launch import BINARY, MODEL, ROOT, SMALL, Streamed
from questions import ask_all, assert_same

EP = "--additional-config.expert_parallel"
CHUNKS = ("--max-num-batched-tokens", "8", "--max-num-seqs", "8")
# dp, tp, ep and flags
LAYOUTS = {
    "tp2": (1, 2, 1, ("-tp", "2")),
    "tp16": (1, 16, 1, ("--tensor-parallel-size", "16", *CHUNKS)),
    "dp3": (3, 1, 1, ("-dp", "3", *CHUNKS)),
    "dp2tp2": (2, 2, 1, ("-dp", "2", "-tp", "2", *CHUNKS)),
    "dp2tp2ep4": (2, 2, 4, ("-dp", "2", "-tp", "2", "--enable-expert-parallel", *CHUNKS)),
    "dp4tp4ep4": (4, 4, 4, ("-dp", "4", "-tp", "4", "--enable-expert-parallel", EP, "4")),
    "dp4tp4ep16": (4, 4, 16, ("-dp", "4", "-tp", "4", "--enable-expert-parallel", EP, "16", *CHUNKS)),
    "tp8ep8": (1, 8, 8, ("-tp", "8", "--enable-expert-parallel")),
    "dp8ep8": (8, 1, 8, ("-dp", "8", "--enable-expert-parallel", *CHUNKS)),
}
FOREVER = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 1, "seed": 1, "ignore_eos": True}


@pytest.fixture(scope="class", params=LAYOUTS)
def layout(request, launch_shared):
    dp, tp, ep, flags = LAYOUTS[request.param]
    program = launch_shared(*SMALL, *flags).wait_ready()
    program.name, program.degrees = request.param, (dp, tp, ep)
    program.dies = list(LAYOUTS).index(request.param) % 2 == 1
    return program


class TestLayouts:
    def test_answers(self, layout, reference):
        assert_same(ask_all(layout, seed=len(layout.name)), reference)

    def test_processes_and_metrics(self, layout):
        dp, tp, ep = layout.degrees
        world, ranks = dp * tp, layout.ranks()
        assert sorted(ranks) == list(range(world))
        assert len(layout.processes()) == world + 1
        up = [labels for name, labels, value in layout.metrics() if name == "tessera:rank_up" and value == 1]
        assert {int(labels["rank"]): int(labels["pid"]) for labels in up} == ranks
        for labels in up:
            rank = int(labels["rank"])
            place = {"dp": rank // tp, "tp": rank % tp, "ep": rank // (world // ep)}
            assert {key: int(labels[key]) for key in place} == place, labels
            assert labels["node"]
        self.check_weights(layout, world)
        self.check_exchanges(layout, dp, tp, ep)
        groups = {
            labels["engine"] for name, labels, _ in layout.metrics() if name == "vllm:num_requests_running"
        }
        assert groups == {str(group) for group in range(dp)}
        assert layout.total("vllm:num_requests_running") == 0
        assert layout.total("vllm:kv_cache_usage_perc") == 0

    def check_weights(self, layout, world):
        metrics = layout.metrics()
        held = {
            int(labels["rank"]): value
            for name, labels, value in metrics
            if name == "tessera:rank_weight_bytes"
        }
        assert sorted(held) == list(range(world))
        planned = subprocess.run(
            [BINARY, "inspect", MODEL, "--layout", "--json", *model_flags(layout.words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert planned.returncode == 0, planned.stderr
        for rank in json.loads(planned.stdout)["ranks"]:
            seen, said = held[rank["rank"]], rank["weight_bytes"]
            assert abs(seen - said) <= 0.05 * said, (rank["rank"], seen, said)

    def check_exchanges(self, layout, dp, tp, ep):
        calls, moved = {}, {}
        for name, labels, value in layout.metrics():
            if name == "tessera:collective_calls_total":
                calls[labels["collective"], int(labels["rank"])] = value
            if name == "tessera:collective_bytes_total":
                moved[labels["collective"], int(labels["rank"])] = value
            if name == "tessera:collective_wire_bytes_total":
                assert value == 0, labels  # one host
        used = {name for (name, rank), value in calls.items() if value > 0}
        world = dp * tp
        if dp == 1:
            wanted = {"all_reduce"}
        elif ep == world:
            wanted = {"all_to_all"} | ({"reduce_scatter", "all_gather"} if tp > 1 else set())
        else:
            wanted = {"reduce_scatter", "all_gather"}
        assert wanted <= used, (wanted, used)
        if tp == 1:  # else the rows of logits travel so
            assert ("all_to_all" in used) == (ep == world), used
        for collective in wanted:
            sent = [moved[collective, rank] for rank in range(world)]
            assert min(sent) > 0, (collective, sent)
            # Nobody is the one whom everything is sent to.
            if dp == 1:
                assert max(sent) < 1.5 * min(sent), (collective, sent)

    def test_end(self, layout):
        streams = [layout.stream(FOREVER) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        if layout.dies:
            self.die(layout, streams)
        else:
            self.drain(layout, streams)

    def drain(self, layout, streams):
        layout.signal(signal.SIGTERM)
        for stream in streams:
            for event in stream:
                last = event["choices"][0]["finish_reason"] or None if event["choices"] else None
            assert stream.done and last == "length"
            stream.close()
        assert layout.wait(60) == 0

    def die(self, layout, streams):
        rank, process = random.Random(layout.name).choice(sorted(layout.ranks().items()))
        killed = time.monotonic()
        os.kill(process, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(Streamed) as error:
                list(stream)
            assert time.monotonic() - killed < 2
            assert_names(str(error.value), rank, process)
            stream.close()
        assert layout.call("/v1/completions", {"prompt": "I am", "max_tokens": 1})[0] in (0, 503)
        assert layout.wait() == 1
        assert_names(layout.text(), rank, process)


def assert_names(text, rank, process):
    """The rank that was killed, how, and no survivor as the cause."""
    assert re.search(rf"rank {rank} \(dp \d+, tp \d+, process {process}\) was killed by signal 9", text), text
    assert len(set(re.findall(r"rank (\d+) \(dp \d+, tp \d+, process \d+\) was killed", text))) == 1, text


def model_flags(words):
    """Of the flags of serve, those that say how the model is cut."""
    kept = []
    for place, word in enumerate(words):
        if word in ("-tp", "-dp", EP, "--tensor-parallel-size"):
            kept += words[place : place + 2]
        elif word == "--enable-expert-parallel":
            kept.append(word)
    return kept
