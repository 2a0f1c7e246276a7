#!/usr/bin/env python3
"""How the cost of an inversion step grows with batch, image size, depth and number of models.

    growth.py [--threads N] [--rounds R] [--steps S] [--quick] [--output FILE.svg]

Runs our side only (`cargo build --example speed`) and draws benches/growth.svg: four panels on logarithmic axes, each point
the median of rounds that go through all points in turn, each line with the exponent e of ms ~ n^e over its upper half (1: cost
in proportion). Batch: Conv4-64 and ResNet-18 (CIFAR stem), 32x32. Image side and depth: a plain network of convolutions 3x3
with 64 channels, BatchNormalization and ReLU, then global pooling (8 layers and batch 8; 32x32 and batch 16). Number of models:
that many Conv4-64, a step of batch 32 of each, in parallel as a run does it. Weights are drawn: they do not change the cost.
Needs onnx and numpy, and ../shared/fixtures for two of the networks.
"""
import argparse
import datetime
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from xml.sax.saxutils import escape

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
OURS = ROOT / "target/debug/examples/speed"
sys.path.append(str(SHARED / "fixtures"))
CHANNELS, CLASSES = 64, 10


def plain_network(path, depth, side):
    """`depth` blocks of convolution 3x3, BatchNormalization, ReLU; global pooling, a linear layer. Any batch."""
    rng = np.random.default_rng(depth)
    nodes, weights, x, channels = [], [], "input", 3

    def weight(name, values):
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    for at in range(depth):
        kernel = weight(f"w{at}", rng.normal(0, math.sqrt(2 / (9 * channels)), (CHANNELS, channels, 3, 3)))
        names = [weight(f"{kind}{at}", np.full(CHANNELS, value))
                 for kind, value in [("scale", 1), ("offset", 0), ("mean", 0), ("variance", 1)]]
        nodes += [helper.make_node("Conv", [x, kernel], [f"c{at}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
                  helper.make_node("BatchNormalization", [f"c{at}", *names], [f"b{at}"]),
                  helper.make_node("Relu", [f"b{at}"], [f"r{at}"])]
        x, channels = f"r{at}", CHANNELS
    head = [weight("head", rng.normal(0, 0.1, (CLASSES, CHANNELS))), weight("bias", np.zeros(CLASSES))]
    nodes += [helper.make_node("GlobalAveragePool", [x], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["flat"]),
              helper.make_node("Gemm", ["flat", *head], ["logits"], transB=1)]
    graph = helper.make_graph(
        nodes, "plain", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def fixture(path, name):
    from hydrate import hydrate

    onnx.save(hydrate(onnx.load(SHARED / "fixtures/architectures" / f"{name}.onnx")), path)


def panels(folder, quick):
    """Title, unit and lines; a line is a name and points (n, arguments of our program)."""
    conv4, resnet18 = folder / "conv4.onnx", folder / "resnet18.onnx"
    fixture(conv4, "conv4.speed")
    fixture(resnet18, "resnet18c.speed")

    def plain(depth, side):
        path = folder / f"plain-{depth}-{side}.onnx"
        if not path.exists():
            plain_network(path, depth, side)
        return path

    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    shown = [
        ("ms a step by batch", "images", [("Conv4-64", [(n, ["inversion", conv4, n]) for n in batches]),
                             ("ResNet-18", [(n, ["inversion", resnet18, n]) for n in batches[:7]])]),
        ("ms a step by image side", "pixels",
         [("8 layers, batch 8", [(n, ["inversion", plain(8, n), 8]) for n in (16, 32, 64, 128, 224)])]),
        ("ms a step by depth", "layers",
         [("32x32, batch 16", [(n, ["inversion", plain(n, 32), 16]) for n in (1, 2, 4, 8, 16, 32)])]),
        ("ms for a step of every model", "models",
         [("Conv4-64, batch 32", [(n, ["models", conv4, 32, n]) for n in (1, 2, 4, 8, 16)])]),
    ]
    if quick:
        shown = [(title, unit, [(name, points[:3]) for name, points in lines]) for title, unit, lines in shown]
    return shown


def run(arguments, steps, threads):
    if not OURS.exists():
        raise SystemExit(f"{OURS} is missing: cargo build --example speed")
    command = [str(OURS), "--steps", str(steps), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, RAYON_NUM_THREADS=str(threads)))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return [float(line) for line in done.stdout.split()]


def measure(shown, rounds, steps, threads):
    """The same with medians in ms in place of the arguments."""
    points = [(tuple(map(str, arguments)), arguments)
              for _, _, lines in shown for _, points in lines for _, arguments in points]
    times = {key: [] for key, _ in points}
    for _ in range(rounds):
        for key, arguments in points:
            times[key] += run(arguments, steps, threads)
    median = {key: statistics.median(values) for key, values in times.items()}
    return [(title, unit, [(name, [(n, median[tuple(map(str, arguments))]) for n, arguments in points])
                           for name, points in lines]) for title, unit, lines in shown]


def exponent(points):
    """Slope of log ms over log n by least squares, over the upper half of the points."""
    upper = points[len(points) // 2 - (len(points) == 2):] if len(points) > 1 else points
    if len(upper) < 2:
        return math.nan
    return float(np.polyfit([math.log(n) for n, _ in upper], [math.log(ms) for _, ms in upper], 1)[0])


# Drawing.

WIDTH, HEIGHT, LEFT, TOP = 430, 300, 58, 46
INK, GRID, COLOURS = "#333333", "#dddddd", ["#1f5fa8", "#c2571a"]


def text(x, y, words, size=12, anchor="start", colour=INK, extra=""):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{extra}>'
            f"{escape(words)}</text>")


def short(value):
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def panel(title, unit, lines, left, top):
    """One panel's elements; its inside is at (left + LEFT, top + TOP)."""
    inner_width, inner_height = WIDTH - LEFT - 20, HEIGHT - TOP - 44
    x0, y0 = left + LEFT, top + TOP
    every = [point for _, points in lines for point in points]
    ns = sorted({n for n, _ in every})
    low, high = math.log(ns[0]), math.log(ns[-1])
    floor = math.floor(math.log10(min(ms for _, ms in every)))
    ceiling = max(math.ceil(math.log10(max(ms for _, ms in every))), floor + 1)

    def at(n, ms):
        return (x0 + inner_width * (math.log(n) - low) / max(high - low, 1e-9),
                y0 + inner_height * (1 - (math.log10(ms) - floor) / (ceiling - floor)))

    drawn = [text(left + LEFT, top + 26, title, 14, extra=' font-weight="bold"')]
    for power in range(floor, ceiling + 1):
        _, y = at(ns[0], 10.0**power)
        drawn += [f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + inner_width}" y2="{y:.1f}" stroke="{GRID}"/>',
                  text(x0 - 8, y + 4, short(10.0**power), 11, "end")]
    for n in ns:
        x, _ = at(n, 10.0**floor)
        drawn += [f'<line x1="{x:.1f}" y1="{y0}" x2="{x:.1f}" y2="{y0 + inner_height}" stroke="{GRID}"/>',
                  text(x, y0 + inner_height + 16, str(n), 11, "middle")]
    drawn.append(text(x0 + inner_width / 2, y0 + inner_height + 34, unit, 12, "middle"))
    for row, ((name, points), colour) in enumerate(zip(lines, COLOURS)):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for n, ms in points:
            x, y = at(n, ms)
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
                         f"<title>{escape(name)}, {n} {unit}: {ms:.3g} ms</title></circle>")
        slope = exponent(points)
        words = name if math.isnan(slope) else f"{name}, exponent {slope:.2f}"
        drawn.append(text(x0 + 10, y0 + 18 + 17 * row, words, 12, colour=colour))
    return drawn


def draw(measured, notes):
    width, height = 2 * WIDTH, 2 * HEIGHT + 48
    body = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for index, (title, unit, lines) in enumerate(measured):
        body += panel(title, unit, lines, WIDTH * (index % 2), HEIGHT * (index // 2))
    body += [text(LEFT, height - 28 + 16 * row, words, 11) for row, words in enumerate(notes)]
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif">')
    return "\n".join([head, *body, "</svg>", ""])


def notes(threads):
    """What the figure shows, and where and when it was measured."""
    def output_of(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    fields = (item.split(":", 1) for item in output_of("lscpu").splitlines() if item.startswith("Model name"))
    model = next((value.strip() for _, value in fields), "unknown processor")
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    return ["An inversion step: forward, statistics, gradient to the pixels. Both axes are logarithmic; exponent 1: cost in "
            "proportion.",
            f"{model}, {threads} threads, {datetime.date.today()}, commit {commit}, benches/reference/growth.py"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the first three points of each line, one round of two steps")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benches/growth.svg")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    with tempfile.TemporaryDirectory() as folder:
        shown = panels(pathlib.Path(folder), arguments.quick)
        measured = measure(shown, arguments.rounds, arguments.steps, arguments.threads)
    for title, unit, lines in measured:
        for name, points in lines:
            figures = ", ".join(f"{n}: {ms:.3g}" for n, ms in points)
            print(f"{title} ({name}), by {unit}: {figures}; exponent {exponent(points):.2f}")
    arguments.output.write_text(draw(measured, notes(arguments.threads)))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
