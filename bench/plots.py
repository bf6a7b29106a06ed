"""Draws docs/performance.md's pictures from results of the benchmarks. Standard library only.

    bench/plots.py --peers peers.json --kernels kernels.json [--context context.json] FOLDER

  peers.json    of `./dev bench peers --json`: throughput over batch, ours and the peer's
  kernels.json  of `tessera bench kernels --filter int8 --json`: each product in the roofline of this machine
  context.json  {"tokens": [...], "decode_tokens_per_second": [...]}: one stream at several contexts
"""

import argparse
import json
import math
import pathlib
import re

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 48
COLOURS = ["#1f5fa8", "#c8511b", "#3a7d44"]


class Picture:
    """Axes with series of points. Scales are logarithmic to base 2 or linear from zero."""

    def __init__(self, title, x_label, y_label, x_range, y_range, log_x=False, log_y=False):
        self.x_range, self.y_range = x_range, y_range
        self.log_x, self.log_y = log_x, log_y
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
            ' font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="22" font-size="15">{title}</text>',
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_label}</text>',
            f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
            f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">{y_label}</text>',
        ]
        self.labels = 0
        for value in ticks(*x_range, log_x):
            x = self.x(value)
            self.line([(x, HEIGHT - BOTTOM), (x, TOP)], "#dddddd")
            self.text(x, HEIGHT - BOTTOM + 16, f"{value:g}", "middle")
        for value in ticks(*y_range, log_y):
            y = self.y(value)
            self.line([(LEFT, y), (WIDTH - RIGHT, y)], "#dddddd")
            self.text(LEFT - 6, y + 4, f"{value:g}", "end")

    def x(self, value):
        return LEFT + share(value, *self.x_range, self.log_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - share(value, *self.y_range, self.log_y) * (HEIGHT - TOP - BOTTOM)

    def line(self, points, colour, width=1):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def text(self, x, y, text, anchor="start", colour="#222222"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
        )

    def series(self, name, points, joined=True):
        colour = COLOURS[self.labels % len(COLOURS)]
        at = [(self.x(x), self.y(y)) for x, y in points]
        if joined:
            self.line(at, colour, 2)
        for x, y in at:
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        self.labels += 1
        self.text(WIDTH - RIGHT - 8, TOP + 16 * self.labels, name, "end", colour)

    def write(self, path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def share(value, low, high, log):
    if log:
        value, low, high = (math.log2(max(v, 1e-9)) for v in (value, low, high))
    return (value - low) / (high - low)


def ticks(low, high, log):
    if log:
        return [2.0**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    step = 10 ** math.floor(math.log10(high / 2))
    step *= next(n for n in (1, 2, 5, 10) if high / (n * step) <= 6)
    return [n * step for n in range(int(high / step) + 1)]


def batch_picture(peers):
    streams = sorted(int(name.removeprefix("decode_")) for name in peers if name.startswith("decode_"))
    figures = {who: [(n, peers[f"decode_{n}"][who]) for n in streams] for who in ("ours", "peer")}
    top = 1.15 * max(rate for points in figures.values() for _, rate in points)
    axes = ("streams", "tokens/s, all streams", (1, streams[-1]), (0, top), True)
    picture = Picture("Decode of the R1 slice", *axes)
    picture.series("Tessera", figures["ours"])
    picture.series("llama.cpp", figures["peer"])
    return picture


def context_picture(context):
    points = list(zip(context["tokens"], context["decode_tokens_per_second"]))
    x_top, y_top = max(x for x, _ in points), 1.15 * max(y for _, y in points)
    picture = Picture("One stream over its context", "tokens before", "tokens/s", (0, x_top), (0, y_top))
    picture.series("Tessera", points)
    return picture


def roofline_picture(kernels):
    """Weights are read once: a product of M rows does 2 M operations per byte."""
    peaks = kernels["peaks"][-1]
    points = {}
    for row in kernels["rows"]:
        shape = re.search(r"int8 m(\d+) n4096 k7168", row["name"])
        if shape and row["threads"] == peaks["threads"] and row["isa"] == peaks["isa"]:
            points[2 * int(shape[1])] = row["gops"]
    x_range = (1, 2 * max(points, default=512))
    y_range = (8, 1.5 * peaks["int8_gops"])
    picture = Picture(
        "int8 product, K 7168, N 4096, weights from memory",
        *("operations per byte of weights", "Gop/s", x_range, y_range, True, True),
    )
    top, slope = peaks["int8_gops"], peaks["memory_gb_s"]
    roof = [(x_range[0], slope * x_range[0]), (top / slope, top), (x_range[1], top)]
    picture.line([(picture.x(x), picture.y(y)) for x, y in roof], "#888888", 2)
    picture.series(f"{peaks['isa']}, {peaks['threads']} threads", sorted(points.items()))
    return picture


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--kernels", type=pathlib.Path)
    parser.add_argument("--context", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    options = parser.parse_args()
    for source, draw, name in (
        (options.peers, batch_picture, "decode_over_batch.svg"),
        (options.context, context_picture, "decode_over_context.svg"),
        (options.kernels, roofline_picture, "roofline.svg"),
    ):
        if source is not None:
            draw(json.loads(source.read_text())).write(options.folder / name)
            print(options.folder / name)


if __name__ == "__main__":
    main()
