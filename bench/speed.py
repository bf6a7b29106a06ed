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
        "latency",
        MODEL,
        "--input-len",
        32,
        "--output-len",
        output_len,
        "--batch-size",
        batch_size,
        "--num-iters-warmup",
        1,
        "--num-iters",
        iterations,
    )
    return batch_size * output_len / result["percentiles"]["50"]


def prefill():
    best = max(
        bench("throughput", MODEL, "--input-len", 2048, "--output-len", 1, "--num-prompts", 16)[
            "tokens_per_second"
        ]
        for _ in range(3)
    )
    return best


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


def over_http(output_len, rounds):
    """Tokens per second of one stream of one-token chunks: the median round."""
    rates = []
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            subprocess.run(
                [
                    BINARY,
                    "bench",
                    "serve",
                    "--port",
                    str(server.port),
                    "--num-prompts",
                    "1",
                    "--ignore-eos",
                    "--random-input-len",
                    "32",
                    "--random-output-len",
                    str(output_len),
                    "--save-result",
                    "--result-dir",
                    folder,
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            rates.append(
                json.loads((pathlib.Path(folder) / "bench-serve.json").read_text())["output_throughput"]
            )
    return sorted(rates)[len(rates) // 2]


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
        print(f"  {rows[-1][0]:<34}{rows[-1][1]:>18}   goal {goal:<28}{rows[-1][3]}", flush=True)

    print(subprocess.run([BINARY, "collect-env"], capture_output=True, text=True, check=True).stdout)
    one = in_process(1, 512, 7)
    row("one stream", one, "tokens/s", "at least 1,500", one >= 1500)
    many = in_process(32, 128, 7)
    row("32 streams", many, "tokens/s", f"at least {4 * one:,.0f} (4 times that)", many >= 4 * one)
    rate = prefill()
    row("prefill", rate, "tokens/s", "at least 8,000", rate >= 8000)
    http = over_http(1024, 7)
    inside = in_process(1, 1024, 7)
    row("HTTP on one stream", 100 * (inside / http - 1), "%", "less than 10", inside / http < 1.1)
    grown = waiting_streams(1000) / 1e6
    row("1,000 streams waiting", grown, "MB", "under 32", grown < 32)


if __name__ == "__main__":
    main()
