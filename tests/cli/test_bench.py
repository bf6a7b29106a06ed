"""The benchmarks of the real binary: flags and the keys of their results. No figure fails them."""

import json

import pytest
from conftest import MODEL, run


def check_head(result):
    """What every result says of the machine and the build."""
    machine = result["machine"]
    assert machine["processor"] and machine["cores"] >= 1 and machine["memory_bytes"] > 0
    assert run("--version").stdout.split()[1] == result["version"]
    assert result["numerics"] == "tessera-2" and result["threads"] >= 1 and "isa" in result


def serve_bench(server, folder, *arguments):
    """(process, result) of a small `bench serve`."""
    done = run(
        *("bench", "serve", "--port", server.port, "--random-input-len", 16, "--random-output-len", 8),
        *("--ignore-eos", "--save-result", "--result-dir", folder, *arguments),
    )
    path = folder / "bench-serve.json"
    return done, json.loads(path.read_text()) if done.returncode == 0 else None


def test_bench_serve_closed_loop(tiny, tmp_path):
    done, result = serve_bench(
        tiny, tmp_path, "--num-prompts", 6, "--max-concurrency", 3, "--goodput", "e2el:100000,ttft:50000"
    )
    assert done.returncode == 0, done.stderr
    check_head(result)
    assert result["completed"] == 6 and result["failed"] == 0 and result["num_prompts"] == 6
    assert result["total_output_tokens"] == 48 and result["total_input_tokens"] == 96
    assert result["max_concurrency"] == 3 and 1 <= result["max_concurrent_requests"] <= 3
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert result["request_rate"] == "inf" and result["backend"] == "openai"
    assert result["duration"] > 0 and result["max_output_tokens_per_s"] > 0
    assert result["total_token_throughput"] == pytest.approx(144 / result["duration"])
    assert result["output_throughput"] == pytest.approx(48 / result["duration"])
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert result[f"mean_{metric}_ms"] > 0
        # Tokens that arrive together have no time between them.
        assert all(result[f"{key}_{metric}_ms"] >= 0 for key in ("median", "p99", "std"))
    assert "itls" not in result


def test_bench_serve_open_loop(tiny, tmp_path):
    done, result = serve_bench(
        *(tiny, tmp_path, "--num-prompts", 8, "--request-rate", 40, "--burstiness", 0.5),
        *("--save-detailed", "--metric-percentiles", "50,90", "--metadata", "host=here", "run=1"),
        *("--temperature", 0.7, "--top-p", 0.9, "--top-k", 20, "--min-p", 0.01, "--logprobs", 2),
        *("--frequency-penalty", 0.1, "--presence-penalty", -2, "--repetition-penalty", 1.1),
    )
    assert done.returncode == 0, done.stderr
    assert result["request_rate"] == 40 and result["burstiness"] == 0.5
    assert result["request_goodput"] is None and result["host"] == "here" and result["run"] == "1"
    assert result["p90_itl_ms"] >= result["p50_itl_ms"] and "p99_itl_ms" not in result
    starts = result["start_times"]
    assert len(starts) == 8 and min(starts) == 0 and max(starts) > 0.02
    assert result["input_lens"] == [16] * 8 and result["output_lens"] == [8] * 8
    assert result["errors"] == [""] * 8 and len(result["ttfts"]) == 8
    assert [len(gaps) for gaps in result["itls"]] == [7] * 8


def test_bench_serve_ramps_up_and_appends(tiny, tmp_path):
    ramp = ("--num-prompts", 6, "--ramp-up-strategy", "exponential", "--append-result")
    ramp += ("--ramp-up-start-rps", 20, "--ramp-up-end-rps", 400)
    for count in (1, 2):
        done = run(
            *("bench", "serve", "--port", tiny.port, "--backend", "openai-chat", "--result-dir", tmp_path),
            *("--random-input-len", 4, "--random-output-len", 2, "--served-model-name", "tiny-r1", *ramp),
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "bench-serve.json").read_text().splitlines()
        assert len(lines) == count
    assert json.loads(lines[1])["ramp_up_end_rps"] == 400


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--goodput", "itl:3"], "itl:3"),
        (["--goodput", "ttft:0"], "ttft:0"),
        (["--ramp-up-strategy", "linear"], "--ramp-up-start-rps"),
        (["--metadata", "nothing"], "nothing"),
        (["--profile"], "--profile"),
        (["--top-p", "1.5"], "--top-p"),
        (["--dataset-name", "sonnet"], "sonnet"),
    ],
)
def test_bench_serve_refuses(arguments, part):
    done = run("bench", "serve", "--port", "1", *arguments)
    assert done.returncode == 2 and part in done.stderr


def test_bench_serve_counts_failures(tiny, tmp_path):
    done = run("bench", "serve", "--port", tiny.port, "--num-prompts", 2, "--model", "nobody")
    assert done.returncode == 1 and "nobody" in done.stderr


def engine_bench(name, path, *arguments):
    done = run("bench", name, MODEL, "--output-json", path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    check_head(result)
    for key in ("ttft_ms", "tpot_ms"):
        assert 0 < result[key]["median"] <= result[key]["p99"]
    assert result["prefill_tokens_per_second"] > 0 and result["decode_tokens_per_second"] > 0
    assert 0 <= result["outside_forward"] < 1
    return result


def test_bench_latency(tmp_path):
    result = engine_bench(
        *("latency", tmp_path / "result.json", "--input-len", 8, "--output-len", 4, "--batch-size", 2),
        *("--num-iters-warmup", 0, "--num-iters", 2, "--disable-detokenize"),
    )
    assert len(result["latencies"]) == 2
    assert set(result["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 2)
    assert result["tokens_per_second"] == pytest.approx(8 / result["avg_latency"])
    assert (result["batch_size"], result["input_len"], result["output_len"]) == (2, 8, 4)
    assert result["ttft_ms"]["mean"] / 1e3 < result["avg_latency"]
    assert result["steps"] >= 4


def test_bench_throughput(tmp_path):
    result = engine_bench(
        *("throughput", tmp_path / "result.json", "--random-input-len", 8, "--output-len", 4),
        *("--num-prompts", 5, "--backend", "vllm"),
    )
    assert result["total_num_tokens"] == 60 and result["num_requests"] == 5
    assert result["tokens_per_second"] == pytest.approx(60 / result["elapsed_time"])
    assert result["output_tokens_per_second"] == pytest.approx(20 / result["elapsed_time"])


def test_bench_step(tmp_path):
    path = tmp_path / "step.json"
    done = run(
        *("bench", "step", MODEL, "--batch-size", 3, "--context-len", 200, "--num-tokens", 2),
        *("--num-iters", 3, "--temperature", 1, "--output-json", path),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    check_head(result)
    assert (result["batch_size"], result["context_len"], result["num_tokens"]) == (3, 200, 2)
    assert len(result["times_ms"]) == 3 and 0 < result["best_ms"] <= result["median_ms"]
    assert result["tokens_per_second"] == pytest.approx(6e3 / result["median_ms"])
    assert result["expanded"] is False
    done = run("bench", "step", MODEL, "--num-tokens", 300, "--expanded", "--output-json", path)
    assert done.returncode == 0 and json.loads(path.read_text())["expanded"] is True
    few_blocks = ("--context-len", 500, "--num-gpu-blocks-override", 4)
    done = run("bench", "step", MODEL, "--batch-size", 3, *few_blocks)
    assert done.returncode == 2 and "12 cache blocks" in done.stderr


def test_bench_kernels_holds_kernels_against_the_machine(tmp_path):
    file = tmp_path / "kernels.json"
    done = run("bench", "kernels", "--filter", "row ra", "--threads", "1", "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    check_head(result)
    assert all(peak["memory_gb_s"] > 0 and peak["int8_gops"] > 0 for peak in result["peaks"])
    assert {row["name"] for row in result["rows"]} == {"row range 7168"}
    for row in result["rows"]:
        assert row["isa"] in result["machine"]["instruction_sets"]
        assert row["threads"] == 1 and row["bound"] == "cache"
        assert min(row["us"], row["gb_s"], row["fraction"], row["over_reference"]) > 0
        assert row["isa"] in done.stdout


def test_bench_kernels_holds_streamed_weights_against_reading(tmp_path):
    file = tmp_path / "kernels.json"
    done = run("bench", "kernels", "--filter", "int8 m1 ", "--threads", "2", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert rows and {row["name"] for row in rows} == {"int8 m1 n4096 k7168"}
    for row in rows:
        assert row["bound"] == "memory" and 0 < row["fraction"]
        assert row["gb_s"] == pytest.approx(4096 * 7168 / row["us"] / 1e3)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--filter", "no such kernel"], "no such kernel"),
        (["--isa", "sse9"], "sse9"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bench_kernels_refuses(arguments, part):
    done = run("bench", "kernels", *arguments)
    assert done.returncode == 2 and part in done.stderr
