#!/usr/bin/env python3
"""Inversion steps on one GPU, ours against PyTorch on the same card in the same call. Not yet run: no GPU was at hand.

    gpu.py prepare         here: builds examples/gpu_speed.rs for CUDA and puts it, the networks and their weights into .gpu/
    gpu.py measure [OUT]   on the GPU machine, .gpu carried along: checks, then times in turns; a table, also to OUT

`prepare` needs what speed.py needs, and ../shared/gpu/build_cuda.sh (nvcc from PyPI, no toolkit, no card). `measure` needs
python3 with torch and safetensors, and CUDA's libraries (cuBLAS, NVRTC): those in torch's own wheels are found by
gpu_run.sh. On a machine that runs commands over a copy of the working tree:

    python3 benches/reference/gpu.py measure $OUT/gpu.md

Rows: Conv4-64 at batch 128 and ResNet-18 (CIFAR stem) at batch 64, 32x32, each in full f32 and in TF32 on both sides.
PyTorch's ways: eager NCHW, eager channels-last, torch.compile (default and reduce-overhead, which is a CUDA graph); the
best one counts. Ours is more than PyTorch's step: it also moves the pixels (shift, priors, Adam) and brings the losses to
the host. Compared before timing: loss and gradient, as in speed.py. MAML is not among the rows: the tape is not on CUDA.
"""
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPU = ROOT / ".gpu"
ROWS = {"conv4": 128, "resnet18": 64}
ROUNDS, STEPS = 5, 30


def prepare():
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import speed
    import torch

    GPU.mkdir(exist_ok=True)
    target = ROOT / "target/cuda-stub"
    subprocess.run(["bash", str(speed.SHARED / "gpu/build_cuda.sh"), "-d", ".", "-f", "cuda", "-b", "metazoa", "-t", ".cuda",
                    "-o", ".gpu", "--", "--example", "gpu_speed"], cwd=ROOT, check=True,
                   env=dict(os.environ, CARGO_TARGET_DIR=str(target)))
    subprocess.run(["strip", "-s", "-o", str(GPU / "gpu_speed"), str(target / "release/examples/gpu_speed")], check=True)
    shutil.copy(speed.SHARED / "gpu/gpu_run.sh", GPU)
    for name, batch in ROWS.items():
        _, graph = speed.prepare(GPU, name, batch)
        torch.save(speed.load_weights(speed.NETWORKS[name][0](), graph).state_dict(), GPU / f"{name}.pt")
    print(subprocess.run(["du", "-sh", str(GPU)], capture_output=True, text=True).stdout.strip())
    print("add /.gpu/ and /.cuda/ to .git/info/exclude, carry .gpu, run `gpu.py measure` there")


def ours(*arguments):
    command = ["bash", str(GPU / "gpu_run.sh"), str(GPU / "gpu_speed"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ours: {done.stderr.strip()}")
    return [float(line) for line in done.stdout.split()]


def networks():
    """speed.py's definitions of the two networks, without what that file imports beside torch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    text = (pathlib.Path(__file__).parent / "speed.py").read_text()
    names = {"torch": torch, "nn": nn, "F": F}
    exec(text[text.index("class Conv4"):text.index("def torchvision_network")], names)
    exec(text[text.index("class Inversion:"):text.index("class Generating:")], names)
    return {"conv4": names["Conv4"], "resnet18": names["ResNet18"]}, names["Inversion"]


def measure(out):
    import torch
    from safetensors.torch import load_file

    definitions, inversion = networks()
    lines = [f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}", "",
             "| row | ours ms | PyTorch ms | its best way | ours / PyTorch | gradient differs by |", "|---|---|---|---|---|---|"]
    for name, batch in ROWS.items():
        for suffix in ("", "+tf32"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(suffix)
            torch.backends.cudnn.benchmark = True
            device, path = f"cuda{suffix}", GPU / f"{name}-{batch}.onnx"
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / "values.safetensors"
                ours("--device", device, "values", path, batch, file)
                values = load_file(file)

            def make(layout):
                module = definitions[name]()
                module.load_state_dict(torch.load(GPU / f"{name}.pt"))
                made = inversion(module.cuda(), values["images"].cuda(), layout)
                made.labels = made.labels.cuda()
                return made

            loss, gradient = make(torch.contiguous_format).gradient()
            wanted = float(values["losses"].sum())
            gap = float((values["gradient"].cuda() - gradient).norm() / gradient.norm())
            if abs(float(loss) - wanted) > (1e-2 if suffix else 1e-3) * abs(wanted) or gap > (2e-1 if suffix else 5e-2):
                raise SystemExit(f"{name}{suffix}: the two sides differ: loss {float(loss)} and {wanted}, gradient {gap:.1e}")
            ways = {"eager NCHW": make(torch.contiguous_format).gradient, "eager NHWC": make(torch.channels_last).gradient}
            for mode in ("default", "reduce-overhead"):
                made = make(torch.channels_last)
                made.loss = torch.compile(made.objective, mode=mode)
                ways[f"compiled {mode}"] = made.gradient
            times = {way: [] for way in ways}
            own = []
            for step in ways.values():
                for _ in range(10):
                    step()
            for _ in range(ROUNDS):
                own += ours("--device", device, "--steps", STEPS, "step", path, batch)
                for way, step in ways.items():
                    for _ in range(STEPS):
                        torch.cuda.synchronize()
                        begin = time.perf_counter()
                        step()
                        torch.cuda.synchronize()
                        times[way].append(1e3 * (time.perf_counter() - begin))
            medians = {way: statistics.median(all) for way, all in times.items()}
            best = min(medians, key=medians.get)
            mine = statistics.median(own)
            lines.append(f"| {name}{suffix}, batch {batch} | {mine:.3f} | {medians[best]:.3f} | {best} | "
                         f"{mine / medians[best]:.2f} | {gap:.1e} |")
    print("\n".join(lines))
    if out:
        pathlib.Path(out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare"]:
            prepare()
        case ["measure", *out]:
            measure(out[0] if out else None)
        case _:
            raise SystemExit(__doc__)
