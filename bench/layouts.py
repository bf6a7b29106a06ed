"""`./dev bench layouts`: tokens per second of each layout of ranks here, beside the bytes they move.

Standard library only; `tessera bench latency` starts the real rank processes. Where ranks share cores the
point is what a step costs on top of one rank, not speed. Layouts take turns, so that a noisy machine is noisy
to all.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
from statistics import median

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = ROOT / "build/release/tessera"
SLICE = ROOT / "build/r1-slice"  # layers of R1's true widths; 7.4 GB
# tp, dp, ep
LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (4, 1, 1),
    (1, 2, 1),
    (1, 2, 2),
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (16, 1, 1),
    (4, 4, 4),
    (4, 4, 16),
]


def measure(options, model, layout, batch_size):
    """The result of one `tessera bench latency`, or None where the shape does not allow the layout."""
    tp, dp, ep = layout
    flags = ["-tp", tp, "-dp", dp]
    if ep > 1:
        flags += ["--enable-expert-parallel", "--additional-config.expert_parallel", ep]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [BINARY, "bench", "latency", model, *flags, "--batch-size", batch_size]
        command += ["--input-len", 16, "--output-len", options.output_len]
        # Room for what is measured; without it a rank's cache would be what its share of the memory leaves.
        command += ["--kv-cache-memory-bytes", "64M", "--max-num-batched-tokens", 1024, "--max-num-seqs", 64]
        command += ["--num-iters-warmup", 1, "--num-iters", options.iterations, "--output-json", file.name]
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"  tp {tp} dp {dp} ep {ep}: {done.stderr.strip().splitlines()[-1][:300]}")
            return None
        return json.load(file)


def make_slice():
    if not SLICE.exists():
        print(f"writing {SLICE.relative_to(ROOT)}", flush=True)
        subprocess.run([BINARY, "make-random", SLICE, "--preset", "r1-slice"], cwd=ROOT, check=True)


def run(options, model, batch_size):
    """Measures and prints one table; its rows."""
    results = {layout: [] for layout in LAYOUTS}
    for _ in range(options.rounds):
        for layout in LAYOUTS:
            if (result := measure(options, model, layout, batch_size)) is not None:
                results[layout].append(result)
    print(f"\n{model}, batch of {batch_size}")
    print(f"  {'layout':<20}{'tokens/s':>10}{'us per step':>13}{'on top':>10}{'bytes per step':>16}")
    rows = []
    for layout, found in results.items():
        if not found:
            continue
        step_us = median(1e6 * median(r["latencies"]) / r["steps"] for r in found)
        row = {
            "model": str(model),
            "layout": layout,
            "batch_size": batch_size,
            "tokens_per_second": median(
                batch_size * options.output_len / median(r["latencies"]) for r in found
            ),
            "step_us": step_us,
            "bytes_per_step": found[-1]["exchanged_bytes"] / found[-1]["steps"],
        }
        rows.append(row)
        name = "tp {} dp {} ep {}".format(*layout)
        print(
            f"  {name:<20}{row['tokens_per_second']:>10,.1f}{step_us:>13,.0f}"
            f"{step_us - rows[0]['step_us']:>10,.0f}{row['bytes_per_step']:>16,.0f}",
            flush=True,
        )
    return rows


def main():
    parser = argparse.ArgumentParser(prog="./dev bench layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/tiny-r1")
    parser.add_argument("--slice", action="store_true", help="also a random slice of R1, 7.4 GB in build/")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="of all layouts in turn")
    parser.add_argument("--layouts", nargs="+", help="of the list only these, as TP,DP,EP")
    parser.add_argument("--json", type=pathlib.Path, help="file for the result")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    if options.layouts:
        wanted = {tuple(int(part) for part in layout.split(",")) for layout in options.layouts}
        LAYOUTS[:] = [layout for layout in LAYOUTS if layout in wanted]
    models = [options.model]
    if options.slice:
        make_slice()
        models.append(SLICE)
    rows = [row for model in models for size in options.batch_sizes for row in run(options, model, size)]
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
