#!/usr/bin/env python3
"""What recovered images cost and what they are worth: FIVE against pixel inversion and a generator for each model.

    recovery.py ZOO --data IMAGES [--binary target/debug/metazoa] [--models 20] [--repeat 1] [--only NAME ...]

Runs `metazoa train` once a way and repetition, the ways by turns, all with the same zoo, number of images and learner
(ProtoNet, same steps), and prints a table in Markdown:

* seconds an image of recovery, all of it, and for FIVE also without the rounds in which its generator learns (what the
  published program's meter counts);
* agreement: share of the images that other models of ZOO, which know the class by name and never saw the image, put into
  it (tests/python/agreement.py);
* diversity: mean distance of two images of one class over that of two images of different classes of one model;
* accuracy of the learner, 5-way, on the meta-val split of IMAGES.

Needs numpy, onnxruntime and PyYAML. Times are wall-clock: leave the machine alone, and read ratios within one run.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIVE = ["recover.by=five"]
WAYS = {
    "pixels, 150 steps": [],
    "pixels, 75 steps": ["recover.white_box.steps=75"],
    "pixels, 30 steps": ["recover.white_box.steps=30"],
    "pixels, 15 steps": ["recover.white_box.steps=15"],
    "generator a model, 200 steps": ["recover.by=generator", "recover.black_box.steps=200"],
    "generator a model, 50 steps": ["recover.by=generator", "recover.black_box.steps=50"],
    "FIVE, no rounds": [*FIVE, "five.rounds=0"],
    "FIVE, no rounds, 8 steps, statistics 0.1": [*FIVE, "five.rounds=0", "five.steps=8", "five.statistics_weight=0.1"],
    "FIVE, no rounds, 15 steps, statistics 0.1": [*FIVE, "five.rounds=0", "five.steps=15", "five.statistics_weight=0.1"],
    "FIVE, 20 rounds": [*FIVE, "five.rounds=20"],
    "FIVE, 60 rounds": [*FIVE, "five.rounds=60"],
    "FIVE, 200 rounds": [*FIVE, "five.rounds=200"],
}


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def diversity(run, recovered):
    """Mean distance within a class over that across the classes of a model."""
    ratios = []
    for path in sorted(run.glob("bank/*.safetensors")):
        _, _, images, classes = recovered(path)
        flat = images.reshape(len(images), -1)
        distances = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1))
        same = classes[:, None] == classes[None]
        other = ~np.eye(len(flat), dtype=bool)
        ratios.append(distances[same & other].mean() / distances[~same].mean())
    return float(np.mean(ratios))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/debug/metazoa")
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "examples/glyphs_ss.yaml")
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600, help="of the learner")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("-s", "--set", action="append", default=[], help="a setting of every run")
    args = parser.parse_args()
    agreement = ROOT / "tests/python/agreement.py"
    rows = {name: [] for name in args.only}
    for turn in range(args.repeat):
        for name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                run = pathlib.Path(folder) / "run"
                settings = [f"max_models={args.models}", f"meta.steps={args.steps}", *WAYS[name], *args.set]
                common = ["--no-progress", "-q", "--seed", str(turn)]
                subprocess.run([args.binary, "train", args.zoo, "--config", args.config, "--out", run, *common,
                                *(word for s in settings for word in ("-s", s))], check=True, stdout=subprocess.DEVNULL)
                row = {"diversity": diversity(run, module(agreement).recovered)}
                record = json.loads((run / "run.json").read_text())
                images = sum(model["images"] for model in record["models"])
                row["seconds"] = record["seconds"]["recover"] / images
                # FIVE's rounds end before the images that are kept begin.
                row["kept"] = row["seconds"] - record["seconds"].get("generator", 0) / images
                judged = subprocess.run([sys.executable, agreement, run, args.zoo], check=True, capture_output=True, text=True)
                row["agreement"] = float(judged.stdout.split()[1])
                for shot in (1, 5):
                    found = subprocess.run([args.binary, "eval", run, "--data", args.data, "--split", "meta_val", "--shot", str(shot),
                                            "--episodes", str(args.episodes), "--seed", "0", "--json", "--no-progress"],
                                           check=True, capture_output=True, text=True)
                    found = json.loads(found.stdout)
                    row[shot] = 100 * found["accuracy"]
                    row[f"ci{shot}"] = 100 * found["ci95"]
                rows[name].append(row)
                print(name, turn, {key: round(value, 4) for key, value in row.items()}, file=sys.stderr, flush=True)
    print("| way | ms an image | without rounds | agreement, % | diversity | 1 shot, % | 5 shots, % |")
    print("|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        mid = {key: statistics.median(row[key] for row in found) for key in found[0]}
        print(f"| {name} | {1000 * mid['seconds']:.1f} | {1000 * mid['kept']:.1f} | {mid['agreement']:.1f} | {mid['diversity']:.2f} "
              f"| {mid[1]:.1f} ± {mid['ci1']:.1f} | {mid[5]:.1f} ± {mid['ci5']:.1f} |")


if __name__ == "__main__":
    main()
