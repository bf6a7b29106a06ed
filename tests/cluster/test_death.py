"""Somebody dies: what clients, the other side and the log learn, how soon, and what is left."""

import concurrent.futures
import os
import random
import re
import signal
import time

import pytest
from launch import SMALL, Host, Streamed, free_port, wait_for

FOREVER = {"prompt": "Once upon a time", "max_tokens": 450, "temperature": 1, "seed": 1, "ignore_eos": True}
FLAGS = (*SMALL, "-dp", "2", "-tp", "2", "--data-parallel-size-local", "1")


@pytest.fixture(params=["loopback", "hosts"])
def pair(request, launch):
    """(head, worker), ready: on one address, and as hosts of their own."""
    if request.param == "loopback":
        places = (Host(), Host())
    else:
        places = request.getfixturevalue("two_hosts")
    where = ("--data-parallel-address", places[0].address, "--data-parallel-rpc-port", free_port())
    env = {"TESSERA_CLUSTER_SECRET": "s"}
    head = launch(*FLAGS, *where, host=places[0], env=env)
    worker = launch(*FLAGS, *where, "--headless", "--data-parallel-start-rank", "1", host=places[1], env=env)
    head.wait_ready()
    return head, worker


def streaming(head, count=3):
    streams = [head.stream(FOREVER | {"seed": seed}) for seed in range(count)]
    for stream in streams:
        next(iter(stream))
    return streams


def errors_of(streams):
    """What the streams end with; they must."""
    errors = []
    for stream in streams:
        with pytest.raises(Streamed) as error:
            for _ in stream:
                pass
        errors.append(error.value.args[0]["message"])
        stream.close()
    return errors


def check_refuses(head):
    assert head.call("/v1/completions", {"prompt": "I am", "max_tokens": 1})[0] in (0, 503)


def kill_a_rank(head, owner):
    """Kills one of the owner's ranks under load; all streams name it, and the head ends. Its process."""
    streams = streaming(head)
    rank, process = random.choice(sorted(owner.ranks().items()))
    killed = time.monotonic()
    os.kill(process, signal.SIGKILL)
    for message in errors_of(streams):
        assert f"rank {rank} " in message and "signal 9" in message, message
    assert time.monotonic() - killed < 2
    check_refuses(head)
    assert head.wait() == 1
    return process


def test_rank_of_the_head(pair):
    head, worker = pair
    process = kill_a_rank(head, head)
    assert worker.wait() not in (0, -signal.SIGKILL)
    assert f"process {process}) was killed by signal 9" in head.text()


def test_rank_of_the_worker(pair):
    head, worker = pair
    process = kill_a_rank(head, worker)
    assert worker.wait() == 1
    for program in pair:
        assert f"process {process}) was killed by signal 9" in program.text()
        assert len(set(re.findall(r"rank (\d+) \(dp", program.text()))) == 1, program.text()


def test_idle_rank_of_the_worker(pair):
    """Nobody asks anything: the death is noticed all the same."""
    head, worker = pair
    rank, process = random.choice(sorted(worker.ranks().items()))
    os.kill(process, signal.SIGKILL)
    assert head.wait() == 1
    assert worker.wait() == 1
    assert f"rank {rank} " in head.text() and "signal 9" in head.text()


def test_step_comes_after_the_death(pair):
    """The worker finds the rank's link closed before it has heard of its end: that is named all the same."""
    head, worker = pair
    rank, process = random.choice(sorted(worker.ranks().items()))
    worker.signal(signal.SIGSTOP)
    os.kill(process, signal.SIGKILL)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(head.call, "/v1/completions", {"prompt": "I am", "max_tokens": 1})
        time.sleep(0.2)  # the step is on its way to the worker
        worker.signal(signal.SIGCONT)
        code, body = answer.result()
    assert code == 500
    assert f"rank {rank} " in body["error"]["message"] and "signal 9" in body["error"]["message"], body
    assert head.wait() == 1
    assert worker.wait() == 1


def test_whole_worker(pair):
    head, worker = pair
    streams = streaming(head)
    killed = time.monotonic()
    worker.signal(signal.SIGKILL)
    for message in errors_of(streams):
        assert "ranks 2 to 3" in message or "rank 2" in message or "rank 3" in message, message
        assert str(worker.process.pid) in message, message
    assert time.monotonic() - killed < 2
    check_refuses(head)
    assert head.wait() == 1
    assert worker.wait() == -signal.SIGKILL


def test_whole_head(pair):
    """The worker ends by itself."""
    head, worker = pair
    streams = streaming(head)
    head.signal(signal.SIGKILL)
    for stream in streams:
        stream.close()
    assert head.wait(5) == -signal.SIGKILL
    assert worker.wait(5) == 1
    assert "the head is gone" in worker.text()


def test_drain(pair):
    head, worker = pair
    streams = streaming(head)
    head.signal(signal.SIGTERM)
    for stream in streams:
        reasons = [event["choices"][0]["finish_reason"] for event in stream if event["choices"]]
        assert stream.done and reasons[-1] == "length"
        stream.close()
    assert head.wait(60) == 0
    assert worker.wait() == 0


def test_worker_is_told_to_leave(pair):
    """SIGTERM of a worker is no crash of it, but the end of the world."""
    head, worker = pair
    streams = streaming(head)
    worker.signal(signal.SIGTERM)
    for message in errors_of(streams):
        assert str(worker.process.pid) in message or "rank" in message, message
    assert head.wait() == 1
    assert worker.wait() == 0


def test_whole_answers_get_an_error(launch):
    """Requests that do not stream, some of them still waiting for their turn."""
    program = launch(*SMALL, "-dp", "2", "--max-num-seqs", "2").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(program.call, "/v1/completions", FOREVER | {"n": 2}) for _ in range(8)]
        wait_for(lambda: program.total("vllm:num_requests_waiting") > 0, 10, "nobody waits")
        os.kill(program.ranks()[1], signal.SIGKILL)
        for answer in answers:
            status, body = answer.result()
            assert status in (500, 503) and "rank 1 " in body["error"]["message"], (status, body)
    assert program.wait() == 1


def test_death_while_draining(launch):
    program = launch(*SMALL, "-tp", "2").wait_ready()
    stream = streaming(program, 1)
    program.signal(signal.SIGTERM)
    wait_for(lambda: "draining" in program.text(), 10, program.text)
    os.kill(program.ranks()[0], signal.SIGKILL)
    assert "rank 0 " in errors_of(stream)[0]
    assert program.wait() == 1


def test_idle_rank(launch):
    program = launch(*SMALL, "-tp", "2").wait_ready()
    rank, process = random.choice(sorted(program.ranks().items()))
    os.kill(process, signal.SIGKILL)
    assert program.wait(10) == 1
    assert f"rank {rank} " in program.text() and "signal 9" in program.text()


def test_rank_that_dies_while_it_starts(launch):
    program = launch(*SMALL, "-tp", "8")
    process = wait_for(lambda: program.ranks().get(5), 20, "rank 5 does not start")
    os.kill(process, signal.SIGKILL)
    assert program.wait() == 1
    assert "rank 5 " in program.text() and "signal 9" in program.text(), program.text()


def test_sigterm_while_it_starts(launch):
    program = launch(*SMALL, "-tp", "8")
    wait_for(lambda: len(program.ranks()) >= 3, 20, "no ranks")
    program.signal(signal.SIGTERM)
    assert program.wait() in (0, 1, -signal.SIGTERM)


def test_head_killed_while_it_starts(launch):
    program = launch(*SMALL, "-tp", "8")
    wait_for(lambda: len(program.ranks()) >= 3, 20, "no ranks")
    program.signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
