#!/usr/bin/env python3
"""Queries a second of every model of a zoo: ours against onnxruntime from Python, in turns (docs/black-box.md).

    black_box.py [--threads N] [--rounds R] [--steps S] [--images N] ZOO...

Ours takes canonical images and is timed with its adapter; Python is given ready tensors of the model's own type and shape,
and the best of `speed.python_ways` counts. Batches of 128, or the file's fixed batch. Medians over all rounds.
"""
import argparse
import pathlib
import statistics
import tempfile

import numpy as np
import onnxruntime

import speed

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(double)": np.float64}


def ready(path, images):
    """Random tensors for `images` images, as many a part as a run takes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    port = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).get_inputs()[0]
    fixed, *sizes = port.shape
    batch = fixed if isinstance(fixed, int) else 128
    sizes = [size if isinstance(size, int) else (3 if axis == 0 else 32) for axis, size in enumerate(sizes)]
    random = np.random.default_rng(0)
    return [(255 * random.random((batch, *sizes))).astype(TYPES[port.type]) if port.type == "tensor(uint8)"
            else random.random((batch, *sizes)).astype(TYPES[port.type]) for _ in range(max(images // batch, 1))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoos", nargs="+", type=pathlib.Path)
    for name, value in (("threads", 2), ("rounds", 3), ("steps", 2), ("images", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    ratios = []
    print("| model | ours, queries/s | Python's best, queries/s | way | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        ours = speed.Ours(folder, arguments.threads)
        for path in (path for zoo in arguments.zoos for path in sorted(zoo.glob("*.onnx"))):
            parts = ready(path, arguments.images)
            count = sum(len(part) for part in parts)
            ways = speed.python_ways(path, parts, arguments.threads)
            for step in ways.values():
                step()
            times = {way: [] for way in ["ours", *ways]}
            for _ in range(arguments.rounds):
                times["ours"] += ours.run("--steps", arguments.steps, "black-box", path, min(128, count), max(count // 128, 1))
                for way, step in ways.items():
                    times[way] += [speed.timed(step) for _ in range(arguments.steps)]
            rate = {way: 1e3 * count / statistics.median(all_) for way, all_ in times.items()}
            own = rate.pop("ours")
            best = max(rate, key=rate.get)
            ratios.append(own / rate[best])
            print(f"| {path.stem} | {own:,.0f} | {rate[best]:,.0f} | {best} | {ratios[-1]:.2f} |", flush=True)
    print(f"\n{len(ratios)} models: ratio {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
