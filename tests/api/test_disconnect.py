"""Clients that leave: their sequences end and their cache blocks come back, seen through /metrics."""
import json
import socket
import time

LIMIT_S = 30


def open_stream(server, stream=True):
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 4000, "temperature": 1, "ignore_eos": True,
                       "stream": stream}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                       + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def busy(server):
    """[sequences in the engine, share of the cache in use]"""
    values = server.metrics()
    return [values["vllm:num_requests_running"] + values["vllm:num_requests_waiting"],
            values["vllm:kv_cache_usage_perc"]]


def wait_until(server, condition):
    end = time.monotonic() + LIMIT_S
    while not condition(state := busy(server)):
        assert time.monotonic() < end, state
        time.sleep(0.02)


def wait_until_empty(server):
    wait_until(server, lambda state: not any(state))


def test_200_cancelled_streams_leave_no_blocks(server):
    connections = [open_stream(server, stream=number % 4 != 3) for number in range(200)]
    for connection in connections[:3]:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")  # in the middle of the answer
    wait_until(server, lambda state: state[0] == 200 and state[1] > 0)
    for connection in connections:
        connection.close()
    wait_until_empty(server)
    started = time.monotonic()
    answer = server.post("/v1/completions", {"prompt": "I am", "max_tokens": 2, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 2
    assert time.monotonic() - started < 5


def test_clients_that_leave_at_once(server):
    for _ in range(50):
        open_stream(server).close()
    wait_until_empty(server)


def test_other_requests_are_untouched(server):
    ask = {"prompt": "I am", "max_tokens": 24, "temperature": 1, "seed": 5, "logprobs": 1}
    alone = server.post("/v1/completions", ask)["choices"]
    connections = [open_stream(server) for _ in range(16)]
    with_others = server.post("/v1/completions", ask)["choices"]
    for connection in connections:
        connection.close()
    assert with_others == alone
    wait_until_empty(server)
