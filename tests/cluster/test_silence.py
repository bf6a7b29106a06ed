"""Nobody dies, but somebody falls silent: every wait has a deadline, and the service ends."""

import os
import signal
import time

import pytest
from launch import SMALL, Streamed, ip

FOREVER = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 1, "seed": 1, "ignore_eos": True}
LIMIT_S = 2
FLAGS = (*SMALL, "-dp", "2", "-tp", "2", "--distributed-timeout-seconds", LIMIT_S)


def error_after(head, silence):
    """What a stream ends with, and the seconds since silence()."""
    stream = head.stream(FOREVER)
    next(iter(stream))
    silence()
    begin = time.monotonic()
    with pytest.raises(Streamed) as error:
        for _ in stream:
            pass
    stream.close()
    return error.value.args[0]["message"], time.monotonic() - begin


def test_frozen_rank(launch):
    head = launch(*FLAGS).wait_ready()
    process = head.ranks()[2]
    message, seconds = error_after(head, lambda: os.kill(process, signal.SIGSTOP))
    assert LIMIT_S - 1 < seconds < LIMIT_S + 5
    assert "did not come in time" in message, message
    assert head.wait() == 1
    assert "did not come in time" in head.text().splitlines()[-1]


def test_frozen_rank_of_a_worker(launch, two_hosts):
    head, worker = start_pair(launch, two_hosts)
    process = worker.ranks()[3]
    message, seconds = error_after(head, lambda: os.kill(process, signal.SIGSTOP))
    assert LIMIT_S - 1 < seconds < LIMIT_S + 5
    assert "did not come in time" in message, message
    assert head.wait() == 1
    assert worker.wait() == 1


def test_cut_cable(launch, two_hosts):
    """Neither side hears that the other is gone; both end."""
    head, worker = start_pair(launch, two_hosts)
    host = two_hosts[1]
    try:
        message, seconds = error_after(
            head, lambda: ip("-n", host.namespace, "link", "set", host.interface, "down")
        )
        assert LIMIT_S - 1 < seconds < LIMIT_S + 5
        assert "did not come in time" in message or "timed out" in message, message
        assert head.wait() == 1
        assert worker.wait() == 1
    finally:
        ip("-n", host.namespace, "link", "set", host.interface, "up")


def start_pair(launch, hosts):
    where = ("--data-parallel-size-local", "1", "--data-parallel-address", hosts[0].address)
    env = {"TESSERA_CLUSTER_SECRET": "s"}
    head = launch(*FLAGS, *where, host=hosts[0], env=env)
    worker = launch(*FLAGS, *where, "--headless", "--data-parallel-start-rank", "1", host=hosts[1], env=env)
    return head.wait_ready(), worker
