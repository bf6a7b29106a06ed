"""Where the Ray driver puts ranks, as plain data: no Ray, no process."""

import importlib.util
import pathlib

import pytest

FILE = pathlib.Path(__file__).resolve().parent.parent.parent / "python/tessera_ray/driver.py"
spec = importlib.util.spec_from_file_location("driver", FILE)
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)


def node(name, npus=8, free=None, cpus=0, is_driver=False):
    total = {"NPU": npus, "CPU": cpus}
    return driver.Node(
        id=name, address=name, host="h", total=total, free=total | {"NPU": npus if free is None else free},
        is_driver=is_driver,
    )  # fmt: skip


def request(groups=1, ranks=16, **values):
    defaults = {
        "local_groups": None, "strategy": "pack", "resource": "", "cores_per_rank": 0, "timeout_s": 1,
        "model": "/m", "binary": "/b",
    }  # fmt: skip
    return driver.Request(groups=groups, ranks_per_group=ranks, **(defaults | values))


def places(wish, nodes):
    found = driver.plan(wish, nodes, "NPU", 1)
    return found and [[node.id for node in ranks] for ranks in found]


def test_tp16_fills_two_nodes_the_drivers_first():
    nodes = [node("10.0.0.1"), node("10.0.0.2", is_driver=True)]
    assert places(request(), nodes) == [["10.0.0.2"] * 8 + ["10.0.0.1"] * 8]


def test_order_is_by_number_not_by_text():
    nodes = [node("10.0.0.10"), node("10.0.0.9"), node("10.0.0.100")]
    assert [found.id for found in driver.in_order(nodes)] == ["10.0.0.9", "10.0.0.10", "10.0.0.100"]


def test_a_group_that_fits_one_node_does_not_span():
    """The driver's node is preferred, not required."""
    nodes = [node("a", free=4, is_driver=True), node("b")]
    assert places(request(ranks=8), nodes) == [["b"] * 8]
    assert places(request(ranks=4), nodes) == [["a"] * 4]
    assert places(request(ranks=12), nodes) == [["a"] * 4 + ["b"] * 8]


def test_as_few_nodes_as_possible():
    nodes = [node("a", free=2), node("b", free=6), node("c", free=8), node("d", free=1)]
    assert places(request(ranks=14), nodes) == [["b"] * 6 + ["c"] * 8]


def test_no_room_is_no_plan():
    assert places(request(), [node("a"), node("b", free=7)]) is None
    assert places(request(), []) is None


@pytest.mark.parametrize("strategy", ["strict", "fill"])
def test_whole_groups(strategy):
    nodes = [node("a"), node("b", free=7), node("c")]
    wish = request(groups=4, ranks=4, strategy=strategy)
    assert places(wish, nodes) == [["a"] * 4, ["a"] * 4, ["b"] * 4, ["c"] * 4]
    assert places(request(groups=6, ranks=4, strategy=strategy), nodes) is None


def test_strict_takes_the_same_number_of_every_node():
    nodes = [node("a", free=16), node("b", free=4), node("c", free=8)]
    wish = request(groups=4, ranks=4, strategy="strict", local_groups=2)
    assert places(wish, nodes) == [["a"] * 4] * 2 + [["c"] * 4] * 2


def test_fill_takes_that_number_of_the_drivers_node_only():
    nodes = [node("a", free=16, is_driver=True), node("b", free=12)]
    wish = request(groups=4, ranks=4, strategy="fill", local_groups=1)
    assert places(wish, nodes) == [["a"] * 4] + [["b"] * 4] * 3


@pytest.mark.parametrize(
    ("nodes", "wish", "wanted"),
    [
        ([node("a"), node("b")], request(), ("NPU", 1)),
        ([node("a", cpus=64)], request(), ("CPU", 4)),  # too few NPU, enough CPU
        ([node("a")], request(), ("NPU", 1)),  # neither: the tutorial's resource is awaited
        ([node("a", npus=0, cpus=8)], request(), ("CPU", 1)),
        ([node("a", npus=0, cpus=64)], request(cores_per_rank=2), ("CPU", 2)),
        ([node("a"), node("b")], request(resource="CPU", cores_per_rank=3), ("CPU", 3)),
        ([node("a")], request(resource="slot"), ("slot", 1)),
    ],
)
def test_resource(nodes, wish, wanted):
    assert driver.choose_resource(wish, nodes)[:2] == wanted


def test_shortage_says_what_is_asked_there_and_missing():
    nodes = [node("10.0.0.1", free=3), node("10.0.0.2")]
    text = driver.shortage(request(), nodes, "NPU", 1)
    assert text.startswith(
        "asked for 16 NPU (16 ranks), free are 11 of 16 (10.0.0.1 3 of 8, 10.0.0.2 8 of 8)"
    )
    assert text.endswith("missing 5")
    whole = request(groups=2, ranks=6, strategy="strict")
    assert "whole groups of 6 NPU" in driver.shortage(
        whole, [node("a", free=16 - 5), node("b", free=3)], "NPU", 1
    )
