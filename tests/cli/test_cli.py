"""The command line of the real binary: help, usage errors, broken checkpoints, signals, the clients."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request

import pytest
from conftest import BINARY, MODEL, ROOT, run, serving


def test_help_is_grouped_and_shows_defaults():
    done = run("serve", "--help")
    assert done.returncode == 0 and not done.stderr
    for part in (
        "Model:",
        "Scheduler and cache:",
        "HTTP:",
        "--max-num-batched-tokens N",
        "(default: 4096)",
        "Accepted without effect:",
        "Refused:",
    ):
        assert part in done.stdout


@pytest.mark.parametrize("command", ["chat", "complete", "make-random", "collect-env", "bench", "inspect"])
def test_every_command_has_help(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: tessera {command}")


def test_version_and_unknown_command():
    assert run("--version").stdout.startswith("tessera ")
    done = run("sevre")
    assert done.returncode == 2 and "unknown command 'sevre'" in done.stderr
    assert run().returncode == 2


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--max-model-length", "5"], ["--max-model-length", "did you mean --max-model-len?"]),
        (["--port", "99999"], ["--port", "99999", "65535"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization", "1.5"]),
        (
            ["--tensor-parallel-size", "16", "--distributed-executor-backend=ray", "--nnodes", "2"],
            ["--nnodes with --distributed-executor-backend ray", "leave --nnodes out"],
        ),
        (["--headless"], ["--headless"]),
        (["-tp", "3"], ["16", "3"]),
        (["-tp", "32"], ["16", "32"]),
        (["-dp", "2", "-pp", "2"], ["--pipeline-parallel-size 2"]),
        (["-dp", "2", "--enable-expert-parallel", "--additional-config.expert_parallel", "4"], ["4", "2"]),
        (["--data-parallel-backend", "ray", "--headless"], ["--headless with --data-parallel-backend ray"]),
        (["--kv-cache-dtype", "fp8"], ["--kv-cache-dtype", "fp8"]),
    ],
)
def test_usage_errors_exit_with_2(arguments, parts):
    done = run("serve", MODEL, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1
    for part in parts:
        assert part in done.stderr


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", MODEL, "--port", port)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr and "in use" in done.stderr


def copy_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / MODEL, folder)
    return folder


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BREAKS = {
    "no folder": (lambda folder: shutil.rmtree(folder), ["config.json"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
    "other router": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(topk_method="greedy")),
        ["topk_method", "greedy"],
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "no weights": (
        lambda folder: (folder / "quant_model_weight_w8a8_dynamic.safetensors").unlink(),
        ["quant_model_weight_w8a8_dynamic.safetensors"],
    ),
    "cut weights": (
        lambda folder: cut(folder / "quant_model_weight_w8a8_dynamic.safetensors"),
        ["quant_model_weight_w8a8_dynamic.safetensors"],
    ),
    "one layer too many": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(num_hidden_layers=5)),
        ["model.layers.4"],
    ),
    "wrong shape": (
        lambda folder: edit(folder / "config.json", lambda c: c.update(q_lora_rank=256)),
        ["q_a"],
    ),
}


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("kind", BREAKS)
def test_broken_checkpoints_are_refused_by_name(tmp_path, kind):
    folder = copy_model(tmp_path)
    change, parts = BREAKS[kind]
    change(folder)
    done = run("serve", folder, "--port", "0")
    assert done.returncode == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_too_small_a_cache_is_refused_with_numbers():
    done = run("serve", MODEL, "--port", "0", "--kv-cache-memory-bytes", "1M")
    assert done.returncode == 1
    assert "163840" in done.stderr and "--max-model-len" in done.stderr


def test_wrong_instruction_set_is_refused():
    done = run("serve", MODEL, "--port", "0", env={"TESSERA_ISA": "neon"})
    assert done.returncode == 1 and "neon" in done.stderr


def test_names_key_and_reach():
    with serving(
        MODEL, "--served-model-name", "a", "b", "--api-key", "k1", "k2", "--max-model-len", "1K"
    ) as server:
        key = {"Authorization": "bearer k2"}
        assert server.call("/v1/models")[0] == 401
        cards = server.call("/v1/models", headers=key)[1]["data"]
        assert [card["id"] for card in cards] == ["a", "b"]
        assert cards[0]["max_model_len"] == 1024
        assert server.call("/v1/completions", {"model": MODEL, "prompt": "x"}, key)[0] == 404
        assert (
            server.call("/v1/completions", {"model": "b", "prompt": "x", "max_tokens": 1}, key)[1]["model"]
            == "a"
        )
        code, log = server.stop()
    assert code == 0
    assert "this address only" in log and "API key needed" in log and "tessera-2" in log


def test_model_as_typed_is_the_name():
    with serving("--model", "./models/tiny-r1", "--trust-remote-code", env={"VLLM_API_KEY": ""}) as server:
        assert server.call("/v1/models")[1]["data"][0]["id"] == "./models/tiny-r1"
        _, log = server.stop()
    assert log.count("--trust-remote-code has no effect") == 1


def test_sigterm_drains_under_load():
    with serving(MODEL) as server:
        answers = []
        started = threading.Semaphore(0)

        def client(number):
            request = urllib.request.Request(
                f"http://127.0.0.1:{server.port}/v1/completions",
                headers={"Content-Type": "application/json"},
                data=json.dumps(
                    {
                        "model": MODEL,
                        "prompt": f"I am {number}",
                        "max_tokens": 200,
                        "ignore_eos": True,
                        "stream": True,
                    }
                ).encode(),
            )
            with urllib.request.urlopen(request, timeout=120) as stream:
                first = stream.readline()
                started.release()
                answers.append((first + stream.read()).decode())

        clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in clients:
            thread.start()
        for _ in clients:
            started.acquire()
        code, log = server.stop()
        for thread in clients:
            thread.join()
    assert code == 0 and "drained" in log
    assert len(answers) == 8
    for answer in answers:
        assert answer.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"length"' in answer


def test_second_signal_ends_at_once():
    with serving(MODEL, "--shutdown-timeout", "600") as server:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/v1/completions",
            headers={"Content-Type": "application/json"},
            data=json.dumps(
                {"model": MODEL, "prompt": "I am", "max_tokens": 100000, "ignore_eos": True, "stream": True}
            ).encode(),
        )
        with urllib.request.urlopen(request, timeout=120) as stream:
            stream.readline()
            server.process.send_signal(signal.SIGTERM)
            for line in server.process.stderr:
                if "draining" in line:
                    break
            code, _ = server.stop()
    assert code == 128 + signal.SIGTERM


def test_config_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("served_model_name: [from-file]\nmax-model-len: 512\ntrust-remote-code: true\n")
    with serving(MODEL, "--config", path, "--max-model-len", "256") as server:
        card = server.call("/v1/models")[1]["data"][0]
        assert (card["id"], card["max_model_len"]) == ("from-file", 256)


def test_tutorial_environment(tmp_path):
    env = {
        "MS_ENABLE_LCCL": "off",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "MS_ALLOC_CONF": "enable_vmm:true",
        "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
        "vLLM_MODEL_BACKEND": "MindFormers",
        "MINDFORMERS_MODEL_CONFIG": str(ROOT / "tests/yaml/predict_tiny_r1_w8a8.yaml"),
    }
    arguments = [f"--model={MODEL}", "--max_model_len=32768", "--block-size=128", "--max-num-seqs=16"]
    with serving(*arguments, "--tensor-parallel-size", "16", env=env) as server:
        _, log = server.stop()
    assert "Run with Mindformers backend" in log and "tp 16, dp 1, ep 1" in log
    done = run("serve", *arguments, env=env)  # the file says 16, no flag does
    assert done.returncode == 2 and "model_parallel" in done.stderr and "16" in done.stderr
    done = run("serve", MODEL, env=env | {"MINDFORMERS_MODEL_CONFIG": str(tmp_path / "missing.yaml")})
    assert done.returncode == 2 and "missing.yaml" in done.stderr


def test_chat_and_complete_commands(tiny):
    url = f"http://127.0.0.1:{tiny.port}/v1"
    done = run("chat", "--url", url, "--quick", "What is 2 plus 3?")
    assert done.returncode == 0 and done.stdout.strip() and not done.stderr
    done = run("complete", "--url", url, "--quick", "I am", "--max-tokens", "8")
    assert done.returncode == 0 and done.stdout.strip()
    done = run("complete", "--url", url, "--quick", "I am", "--model-name", "nobody")
    assert done.returncode == 1 and "nobody" in done.stderr
    done = run("chat", "--url", "http://127.0.0.1:1/v1", "-q", "x")
    assert done.returncode == 1 and "no server at 127.0.0.1:1" in done.stderr


def test_chat_reads_a_conversation_from_a_pipe(tiny):
    done = subprocess.run(
        [BINARY, "chat", "--url", f"http://127.0.0.1:{tiny.port}/v1", "--max-tokens", "20"],
        input="What is 2 plus 3?\nAnd 4 plus 5?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip()


def test_random_checkpoint_is_served(tmp_path):
    folder = tmp_path / "random"
    assert run("make-random", folder, "--hidden-size", "64", "--seed", "3").returncode == 0
    with serving(folder, "--max-model-len", "128") as server:
        status, answer = server.call(
            "/v1/completions", {"model": str(folder), "prompt": [5, 6], "max_tokens": 4}
        )
        assert status == 200 and answer["usage"]["total_tokens"] == 6
    done = run("make-random", folder)
    assert done.returncode != 0 and str(folder) in done.stderr


def test_random_checkpoint_beside_gguf(tmp_path):
    done = run("make-random", tmp_path / "toy", "--gguf", tmp_path / "toy.gguf")
    assert done.returncode == 0, done.stderr
    assert "w8a8" in done.stdout and str(tmp_path / "toy.gguf") in done.stdout
    assert (tmp_path / "toy/quant_model_description.json").exists()
    assert (tmp_path / "toy.gguf").read_bytes()[:8] == b"GGUF\3\0\0\0"
    done = run("make-random", tmp_path / "bf16", "--format", "bf16", "--gguf", tmp_path / "bf16.gguf")
    assert done.returncode == 2 and "beside the W8A8 format" in done.stderr
    assert not (tmp_path / "bf16").exists()


def test_collect_env():
    done = run("collect-env", env={"VLLM_API_KEY": "secret"})
    assert done.returncode == 0
    assert "instruction sets" in done.stdout and "secret" not in done.stdout
