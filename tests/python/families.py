#!/usr/bin/env python3
"""White-box over the families of timm and torchvision: exports one small member of each and inspects it.

    families.py METAZOA OUT [--export ts|dyn] [--most MB] [--only NAME ...]

METAZOA  the command (target/debug/metazoa)
OUT      a folder for the ONNX files; finished ones are not made again, and OUT/results.jsonl goes on where it stopped

Weights are random, 10 classes, running statistics drawn, so that nothing is exactly 0 or 1. Prints a line for each model that
is not white-box, whose output is further from ONNX Runtime's than 2e-5 and 20 times the network's own rounding, or
whose gradient is further than 1e-4 from central differences in f64; then how many are none of these. Needs the environment of
../shared/torch-cpu/install.sh (torch, torchvision, timm, onnx, onnxscript, onnxruntime).
"""
import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import warnings

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported
warnings.filterwarnings("ignore")

import timm  # noqa: E402
import torch  # noqa: E402

SECONDS = 400  # for one export, and for one inspection
LARGEST_IMAGE = 288
TORCHVISION = "alexnet googlenet inception_v3 mnasnet0_5 shufflenet_v2_x0_5 efficientnet_v2_s maxvit_t swin_t swin_v2_t regnet_y_400mf resnext50_32x4d squeezenet1_0 convnext_tiny mobilenet_v3_small".split()


def families():
    """The smallest member of each module of timm whose images are not large."""
    members = collections.defaultdict(list)
    for name in timm.list_models():
        members[timm.models.model_entrypoint(name).__module__].append(name)
    for names in members.values():
        sizes = {}
        for name in names[:40]:
            if image_side(name) <= LARGEST_IMAGE:
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name, num_classes=10)
                    sizes[name] = sum(p.numel() for p in model.parameters())
                except Exception:  # some cannot be made without their weights
                    continue
        if sizes:
            yield min(sizes, key=sizes.get)


def image_side(name):
    config = timm.get_pretrained_cfg(name)
    return (config.input_size if config else (3, 224, 224))[1]


def export(name, way, path):
    """Writes one model; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name in TORCHVISION:
        import torchvision

        more = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
        side = {"inception_v3": 299, "swin_v2_t": 256}.get(name, 224)
    else:
        model, side = timm.create_model(name, num_classes=10, exportable=True), image_side(name)
    draw = torch.Generator().manual_seed(1)
    for module in model.eval().modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=draw)
            module.running_var.uniform_(0.7, 1.4, generator=draw)
    images, names = torch.randn(2, 3, side, side), {"input_names": ["input"], "output_names": ["logits"]}
    if way == "ts":
        axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(model, images, path, dynamo=False, dynamic_axes=axes, opset_version=17, **names)
    else:
        batch = torch.export.Dim("batch", min=1, max=64)
        torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, **names)


def inspect(command, path):
    done = subprocess.run([command, "inspect", path, "--check-gradient", "--json", "--no-progress"],
                          capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        return {"error": done.stderr.strip()}
    found = json.loads(done.stdout)
    keys = "access unsupported_ops output_rel_err output_noise gradient_rel_err gradient_noise compile_ms runtime_open_ms peak_mib norm_taps"
    return {key: found[key] for key in keys.split()}


def complaint(found):
    if "error" in found:
        return found["error"]
    if found["access"] != "white-box" or found["unsupported_ops"]:
        return f"{found['access']}, lacks {found['unsupported_ops']}"
    if not found["output_rel_err"] <= max(2e-5, 20 * found["output_noise"]):
        return f"output {found['output_rel_err']:.1e}, its rounding {found['output_noise']:.1e}"
    if not found["gradient_rel_err"] <= 1e-4:
        return f"gradient {found['gradient_rel_err']:.1e} from differences, f32 {found['gradient_noise']:.1e} from f64"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--export", choices=["ts", "dyn"], default="ts")
    parser.add_argument("--most", type=float, default=70, help="largest file inspected, MB")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.make:
        return export(options.make, options.export, str(options.out / f"{options.make}.{options.export}.onnx"))
    results = options.out / "results.jsonl"
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    seen, good = {row["file"] for row in known}, 0
    for name in options.only or [*TORCHVISION, *families()]:
        path = options.out / f"{name}.{options.export}.onnx"
        if path.name in seen:
            continue
        try:
            if not path.exists():
                make = [sys.executable, __file__, options.command, str(options.out), "--export", options.export, "--make", name]
                subprocess.run(make, check=True, capture_output=True, timeout=SECONDS)
            if path.stat().st_size > options.most * 1e6:
                continue
            row = {"file": path.name, **inspect(options.command, str(path))}
        except subprocess.CalledProcessError as error:
            print(f"{path.name}: PyTorch cannot export it: {error.stderr.decode().strip().splitlines()[-1][:150]}", flush=True)
            continue
        except subprocess.TimeoutExpired:
            row = {"file": path.name, "error": f"more than {SECONDS} s"}
        known.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    for row in known:
        why = complaint(row)
        good += why is None
        if why:
            print(f"{row['file']}: {why}")
    print(f"{good} of {len(known)} white-box, as ONNX Runtime computes them, with the gradient of central differences")


if __name__ == "__main__":
    main()
