#!/usr/bin/env python3
"""Inversion steps against PyTorch: same architecture, batch and loss, rounds of both by turns.

    step_speed.py [--threads N] [--rounds R] [--compile] CASE...

CASE is conv4 (Conv4-64, 32x32, batch 128) or resnet18 (CIFAR stem, 32x32, batch 64), or both. A step is a
forward in evaluation mode, cross-entropy plus the distance of every BatchNormalization input's batch statistics
from the running ones, and the gradient to the pixels. Ours: target/debug/examples/step_speed
(`cargo build --example step_speed`) on ../shared/fixtures/architectures/*.speed.onnx, whose weights are drawn first
(tests do the same; here by ../shared/fixtures/hydrate.py). PyTorch: the better of NCHW and channels-last, and with
--compile of torch.compile. Prints medians and their ratio. Needs torch (../shared/torch-cpu/install.sh), onnx.
"""
import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def conv4(width=64, classes=10):
    layers, channels = [], 3
    for _ in range(4):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, classes))


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.short = nn.Identity()
        if stride != 1 or channels != width:
            self.short = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet18(classes=10):
    blocks, channels = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for width, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        blocks.append(Block(channels, width, stride))
        channels = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class Step:
    """One inversion step in PyTorch."""

    def __init__(self, model, batch, memory_format, compiled=False):
        self.model = model.eval().requires_grad_(False).to(memory_format=memory_format)
        self.seen = []
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(self.tap)
        self.x = torch.rand(batch, 3, 32, 32).to(memory_format=memory_format).requires_grad_(True)
        self.labels = torch.arange(batch) % 10
        self.run = torch.compile(self.loss) if compiled else self.loss

    def tap(self, module, inputs):
        x = inputs[0]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.seen.append((mean - module.running_mean).norm() + (var - module.running_var).norm())

    def loss(self, x):
        self.seen.clear()
        loss = F.cross_entropy(self.model(x), self.labels)
        return loss + sum(self.seen)

    def __call__(self):
        begin = time.perf_counter()
        torch.autograd.grad(self.run(self.x), self.x)
        return 1e3 * (time.perf_counter() - begin)


CASES = {"conv4": (conv4, "conv4.speed.onnx", 128), "resnet18": (resnet18, "resnet18c.speed.onnx", 64)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="conv4, resnet18; default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours_program = ROOT / "target/debug/examples/step_speed"
    environment = dict(os.environ, RAYON_NUM_THREADS=str(args.threads), ORT_DISABLE_TELEMETRY="1")
    for case in args.cases or CASES:
        build, name, batch = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / name
            hydrate = [sys.executable, SHARED / "fixtures/hydrate.py", SHARED / "fixtures/architectures" / name, model]
            subprocess.run(hydrate, check=True)
            steps = {"NCHW": Step(build(), batch, torch.contiguous_format),
                     "channels last": Step(build(), batch, torch.channels_last)}
            if args.compile:
                steps["compiled"] = Step(build(), batch, torch.channels_last, compiled=True)
            for step in steps.values():
                step(), step()
            times = {key: [] for key in [*steps, "ours"]}
            for _ in range(args.rounds):
                for key, step in steps.items():
                    times[key] += [step() for _ in range(args.steps)]
                lines = subprocess.run([ours_program, model, str(batch), str(args.steps)], check=True,
                                       capture_output=True, text=True, env=environment).stdout.split()
                times["ours"] += [float(line) for line in lines]
        medians = {key: statistics.median(values) for key, values in times.items()}
        best = min(value for key, value in medians.items() if key != "ours")
        shown = ", ".join(f"{key} {value:.1f} ms" for key, value in medians.items())
        print(f"{case}, batch {batch}, {args.threads} threads: {shown}; ours / best of PyTorch = {medians['ours'] / best:.2f}")


if __name__ == "__main__":
    main()
