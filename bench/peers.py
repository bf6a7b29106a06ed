"""`./dev bench peers`: Tessera beside llama.cpp on one model, and its int8 product beside oneDNN's.

`--prepare` builds the peers and writes the model in both forms (checkpoint and GGUF, the same weights) into a
cache outside the source tree; a run does it too where something is missing. What is measured:

  gemm_m64     int8 product, K 7168, N 4096, M 64, weights from memory; 10^9 operations per second
  prefill_512  one prompt of 512 tokens; prompt tokens per second
  decode_N     N streams after short prompts; generated tokens per second of all of them
  context_4k   one stream after 4096 tokens; here the peer is Tessera itself after a short prompt

Engines take turns as processes (ours, peer, ours, peer), so that a noisy machine is noisy to both and never
two models are in memory; each process warms up by itself, all cores work, and the figure is the median of the
turns. llama.cpp runs with flash attention off and on in its first turn, then the better way. Ours:
`tessera bench latency`, where prefill ends with the first token of the last stream and decode is what comes
after that. Standard library only. No figure fails it.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import shlex
import subprocess
import tempfile
import time
from statistics import median

from peers_prepare import BINARY, CACHE, LLAMA, SIZE_GB, native_folder, prepare, run

ROOT = pathlib.Path(__file__).resolve().parent.parent
GEMM = {"m": 64, "k": 7168, "n": 4096}
STREAMS = [1, 8, 16, 32]
NAMES = ["gemm_m64", "prefill_512", *(f"decode_{n}" for n in STREAMS), "context_4k"]
SHORT_PROMPT, DECODE_LEN, CONTEXT = 8, 16, 4096
BUSY_CORES = 0.05  # of other processes: more voids a turn


class Bench:
    """Runs processes of both engines and remembers their command lines."""

    def __init__(self, options):
        self.options = options
        self.folder = native_folder()
        self.model = options.slice or CACHE / options.preset
        self.gguf = options.gguf or CACHE / f"{options.preset}.gguf"
        self.cores = len(os.sched_getaffinity(0))
        self.machine = {}  # with its peaks, by `tessera bench kernels`
        self.versions = {}
        self.flash = {}  # of each program of llama.cpp: the better way
        self.other_cores = 0.0  # the most that other processes took, of all processes since the last reset

    def process(self, command):
        """Runs a measured command; its output."""
        command = [*shlex.split(self.options.launcher), *map(str, command)]
        before, start = cpu_seconds(), time.monotonic()
        output = run(command, cwd=ROOT)
        busy = [after - earlier for after, earlier in zip(cpu_seconds(), before)]
        seconds = time.monotonic() - start
        if seconds > 1:  # the kernel counts in hundredths of a second
            self.other_cores = max(self.other_cores, (busy[0] - busy[1]) / seconds)
        return output, shlex.join(command)

    def ours(self, command, key):
        """The JSON that one of our benchmarks writes, and its command line without the file."""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            _, line = self.process([BINARY, "bench", *command, key, file.name])
            return json.load(file), line.rsplit(f" {key}", 1)[0]

    def latency(self, batch_size, input_len, output_len, warmup=1):
        command = ["latency", self.model, "--batch-size", batch_size, "--input-len", input_len]
        command += ["--output-len", output_len, "--num-iters-warmup", warmup, "--num-iters", 1]
        command += ["--kv-cache-memory-bytes", "256M"]
        return self.ours(command, "--output-json")

    def our_gemm(self):
        name = "int8 m{m} n{n} k{k}".format(**GEMM)
        result, line = self.ours(["kernels", "--filter", name, "--threads", self.cores], "--json")
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty"]  # there may be none
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        self.versions["tessera"] = f"{result['version']} {commit}, {result['numerics']}"
        self.machine = result["machine"] | result["peaks"][-1]
        return {"gemm_m64": (result["rows"][-1]["gops"], line)}

    def our_engine(self, names):
        figures = {}
        for name in names:
            if name == "prefill_512":
                result, line = self.latency(1, 512, 1)
                figures[name] = (result["prefill_tokens_per_second"], line)
            else:
                streams = int(name.removeprefix("decode_"))
                result, line = self.latency(streams, SHORT_PROMPT, DECODE_LEN * (2 if streams == 1 else 1))
                figures[name] = (result["decode_tokens_per_second"], line)
        return figures

    def our_context(self):
        # Reading the context is the warm-up.
        result, line = self.latency(1, CONTEXT, 2 * DECODE_LEN, warmup=0)
        return {"context_4k": (result["decode_tokens_per_second"], line)}

    def peer_gemm(self):
        output, line = self.process([self.folder / "onednn_gemm", 1500, GEMM["k"], GEMM["n"], GEMM["m"]])
        row, version = map(json.loads, output.splitlines())
        self.versions["oneDNN"] = version["version"]
        return {"gemm_m64": (row["gops"], line)}

    def llama_bench(self, names, flash):
        """Prefill, and decode of one stream."""
        command = [self.folder / "llama-bench", "-m", self.gguf, "-t", self.cores]
        command += ["-p", 512 * ("prefill_512" in names), "-n", 2 * DECODE_LEN * ("decode_1" in names)]
        command += ["-r", 1, "-lm", "none", "-fa", flash, "-o", "json"]
        output, line = self.process(command)
        rows = json.loads(output)
        self.versions["llama.cpp"] = f"{LLAMA}, llama.cpp {rows[0]['build_commit']}"
        return {"prefill_512" if row["n_prompt"] else "decode_1": (row["avg_ts"], line) for row in rows}

    def llama_batched(self, names, flash):
        """Decode of many streams."""
        streams = ",".join(name.removeprefix("decode_") for name in names)
        command = [self.folder / "llama-batched-bench", "-m", self.gguf, "-t", self.cores, "-c", 8192]
        command += ["-b", 512, "-ub", 512, "-npp", SHORT_PROMPT, "-ntg", DECODE_LEN, "-npl", streams]
        command += ["-lm", "none", "-fa", flash, "--output-format", "jsonl"]
        output, line = self.process(command)
        self.versions.setdefault("llama.cpp", LLAMA)
        rows = [json.loads(text) for text in output.splitlines() if text.startswith("{")]
        return {f"decode_{row['pl']}": (row["speed_tg"], line) for row in rows}

    def better_flash(self, program, names):
        """The program's figures, by name the better of flash attention off and on; both only in turn one."""
        ways = self.flash.get(program.__name__, ["off", "on"])
        results = {way: program(names, way) for way in ways}
        chosen = {name: max(ways, key=lambda way: results[way][name][0]) for name in results[ways[0]]}
        self.flash[program.__name__] = sorted(set(chosen.values()))
        return {name: results[way][name] for name, way in chosen.items()}


def cpu_seconds():
    """(CPU seconds of this machine, of this program's finished processes)"""
    ticks = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq = map(int, ticks[:7])
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return total, sum(usage.ru_utime + usage.ru_stime for usage in own)


def groups(bench, names):
    """[(names, ours, peer)]: what takes turns. Both give {name: (figure, command line)}."""
    single = [name for name in names if name in ("prefill_512", "decode_1")]
    batched = [name for name in names if name.startswith("decode_") and name != "decode_1"]
    found = []
    if "gemm_m64" in names:
        found.append((["gemm_m64"], bench.our_gemm, bench.peer_gemm))
    for part, program in ((single, bench.llama_bench), (batched, bench.llama_batched)):
        if part:
            ours = functools.partial(bench.our_engine, part)
            found.append((part, ours, functools.partial(bench.better_flash, program, part)))
    if "context_4k" in names:
        empty = functools.partial(bench.our_engine, ["decode_1"])
        found.append((["context_4k"], bench.our_context, lambda: {"context_4k": empty()["decode_1"]}))
    return found


def measure(bench, names, rounds):
    """{name: row of the result}"""
    rows = {}
    for part, ours, peer in groups(bench, names):
        turns = {name: {"ours": [], "peer": []} for name in part}
        bench.other_cores = 0.0
        for number in range(rounds):
            for side, program in (("ours", ours), ("peer", peer)):
                figures = program()
                for name in part:
                    turns[name][side].append(figures[name])
                seen = ", ".join(f"{name} {figures[name][0]:.2f}" for name in part)
                print(f"  turn {number + 1}, {side}: {seen}", flush=True)
        for name in part:
            rows[name] = row_of(bench, name, turns[name])
    return rows


def row_of(bench, name, turns):
    own, other = (median(rate for rate, _ in turns[side]) for side in ("ours", "peer"))
    engine = {"gemm_m64": "oneDNN", "context_4k": "tessera"}.get(name, "llama.cpp")
    return {
        "ours": own,
        "peer": other,
        "ratio": own / other,
        "unit": "Gop/s" if name == "gemm_m64" else "tokens/s",
        "peer_name": engine,
        "peer_version": bench.versions[engine],
        "ours_turns": [rate for rate, _ in turns["ours"]],
        "peer_turns": [rate for rate, _ in turns["peer"]],
        "ours_command": turns["ours"][-1][1],
        "peer_command": max(turns["peer"])[1],
        "other_processes_cores": round(bench.other_cores, 3),
    }


def print_table(rows):
    print(f"\n  {'':<14}{'ours':>10}{'peer':>10}{'ratio':>8}  unit      peer")
    for name, row in rows.items():
        line = f"  {name:<14}{row['ours']:>10.2f}{row['peer']:>10.2f}{row['ratio']:>8.2f}  {row['unit']:<10}"
        print(line + (row["peer_name"] if name != "context_4k" else "ours, short prompt"))
    if any(row["other_processes_cores"] > BUSY_CORES for row in rows.values()):
        print("  other processes took more than 5 % of a core: measure again on a quiet machine")


def absolute(path):
    return pathlib.Path(path).resolve()


def main():
    parser = argparse.ArgumentParser(
        prog="./dev bench peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prepare", action="store_true", help="only build the peers and write the model")
    parser.add_argument("--json", type=pathlib.Path, help="file for the result")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="these alone")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine")
    parser.add_argument("--preset", choices=list(SIZE_GB), default="r1-slice", help="toy: to try the script")
    parser.add_argument("--slice", type=absolute, help="a checkpoint to use instead of the cached one")
    parser.add_argument("--gguf", type=absolute, help="its GGUF file")
    parser.add_argument("--launcher", default="", help="command before each process: 'numactl -C 0-15'")
    options = parser.parse_args()
    if bool(options.slice) != bool(options.gguf):
        parser.error("--slice and --gguf belong together: they hold the same weights")
    names = [name for name in NAMES if name in options.only]
    has_own_model = bool(options.slice)
    prepare(options.preset, has_own_model, gemm="gemm_m64" in names, engine=names != ["gemm_m64"])
    if options.prepare:
        print(f"ready in {CACHE}")
        return
    bench = Bench(options)
    bench.our_gemm()  # says what the machine is
    line = "{processor}, {cores} cores, {isa}: reads {memory_gb_s:.1f} GB/s, int8 {int8_gops:.0f} Gop/s"
    print(line.format(**bench.machine), flush=True)
    rows = measure(bench, names, options.rounds)
    print_table(rows)
    if options.json:
        result = rows | {"machine": bench.machine, "versions": bench.versions, "model": str(bench.model)}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
