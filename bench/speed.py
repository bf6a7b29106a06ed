"""The speed table of `./dev bench`: tiny-r1 on this machine, by the real binary. No figure fails it.

Standard library only. In-process figures come from `tessera bench latency` and `throughput`, those over HTTP
from `tessera bench serve` against a server started here.
"""

import json
import os
import pathlib
import re
import resource
import socket
import subprocess
import tempfile
import time
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = ROOT / "build/release/tessera"
MODEL = "models/tiny-r1"


def bench(*arguments):
    """The result file of one `tessera bench` in this process."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run(
            [BINARY, "bench", *map(str, arguments), "--output-json", file.name],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.load(file)


def in_process(batch_size, output_len, iterations):
    """Generated tokens per second of a batch; the median round, since a shared machine has slow ones."""
    result = bench(
        *("latency", MODEL, "--batch-size", batch_size, "--input-len", 32, "--output-len", output_len),
        *("--num-iters-warmup", 1, "--num-iters", iterations),
    )
    return batch_size * output_len / result["percentiles"]["50"]


def streams(rounds):
    """Tokens per second of one stream and of 32, measured in turn: medians."""
    pairs = [(in_process(1, 512, 3), in_process(32, 128, 2)) for _ in range(rounds)]
    return [median(rates) for rates in zip(*pairs)]


def prefill(input_len, rounds):
    """Prompt tokens per second of prompts of `input_len`: the median round."""
    arguments = ("--input-len", input_len, "--output-len", 1, "--num-prompts", 16384 // input_len)
    return median(bench("throughput", MODEL, *arguments)["tokens_per_second"] for _ in range(rounds))


class Server:
    """A `tessera serve` of tiny-r1 on a free port."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [BINARY, "serve", MODEL, "--port", "0", "--log-level", "warning", *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for line in self.process.stdout:
            if found := re.search(r"curl http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                break

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def resident(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def metric(self, name):
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n")
            text = connection.makefile("rb").read().decode()
        return sum(
            float(value)
            for value in re.findall(rf"^{re.escape(name)}{{[^}}]*}} ([\d.e+]+)$", text, re.MULTILINE)
        )


def over_http(port, output_len):
    """One stream of a server: its rate, and tokens per chunk (text that ends inside a character waits)."""
    with tempfile.TemporaryDirectory() as folder:
        # The requests of `bench latency`: the model's own defaults would sample with top-p.
        subprocess.run(
            [BINARY, "bench", "serve", "--port", str(port), "--num-prompts", "1", "--num-warmups", "1"]
            + ["--random-input-len", "32", "--random-output-len", str(output_len), "--ignore-eos"]
            + ["--temperature", "1", "--extra-body", '{"top_p": 1, "top_k": -1}']
            + ["--save-result", "--result-dir", folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads((pathlib.Path(folder) / "bench-serve.json").read_text())
    return result["output_throughput"], result["mean_itl_ms"] / result["mean_tpot_ms"]


def http_share(output_len, rounds):
    """What HTTP adds to the time of one stream, in percent, and the tokens of a chunk: medians of pairs of
    streams of the same work, in this process and over HTTP, in turn."""
    added, per_chunk = [], []
    with Server("--no-enable-prefix-caching", "--max-model-len", str(32 + output_len)) as server:
        for _ in range(rounds):
            inside = in_process(1, output_len, 1)
            rate, tokens = over_http(server.port, output_len)
            added.append(100 * (inside / rate - 1))
            per_chunk.append(tokens)
    return median(added), median(per_chunk)


def waiting_streams(count):
    """Bytes that the server grows by while `count` streams wait in its queue."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    body = json.dumps(
        {"model": MODEL, "prompt": "I am", "max_tokens": 100000, "stream": True, "ignore_eos": True}
    )
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    with Server("--max-num-seqs", "1") as server:

        def open_streams(number):
            streams = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(number)]
            for stream in streams:
                stream.sendall(request)
            return streams

        def wait_for(waiting):
            for _ in range(600):
                if server.metric("vllm:num_requests_waiting") >= waiting:
                    return
                time.sleep(0.05)

        # The first two make the server touch what any request touches; one of them runs all the time.
        streams = open_streams(2)
        wait_for(1)
        before = server.resident()
        streams += open_streams(count)
        wait_for(count + 1)
        grown = server.resident() - before
        for stream in streams:
            stream.close()
    return grown


def main():
    os.environ.pop("VLLM_API_KEY", None)
    rows = []

    def row(what, value, unit, goal, reached):
        rows.append(
            (
                what,
                f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.1f} {unit}",
                goal,
                "yes" if reached else "NO",
            )
        )
        print(f"  {rows[-1][0]:<38}{rows[-1][1]:>18}   goal {goal:<32}{rows[-1][3]}", flush=True)

    print(subprocess.run([BINARY, "collect-env"], capture_output=True, text=True, check=True).stdout)
    one, many = streams(5)
    row("one stream", one, "tokens/s", "at least 1,500", one >= 1500)
    row("32 streams", many, "tokens/s", f"at least {4 * one:,.0f} (4 times that)", many >= 4 * one)
    for length in (512, 2048):
        rate = prefill(length, 5)
        row(f"prefill, prompts of {length:,}", rate, "tokens/s", "at least 8,000", rate >= 8000)
    added, tokens = http_share(1024, 9)
    row(f"HTTP on one stream, {tokens:.2f} a chunk", added, "%", "less than 10", added < 10)
    grown = waiting_streams(1000) / 1e6
    row("1,000 streams waiting", grown, "MB", "under 32", grown < 32)


if __name__ == "__main__":
    main()
