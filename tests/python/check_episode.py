#!/usr/bin/env python3
"""Answers the episodes of `metazoa eval` again, with Python's ONNX Runtime and an exported learner.

    check_episode.py EPISODE.onnx EPISODES.jsonl IMAGES [--episodes N]

EPISODE.onnx    `metazoa export RUN --form episode --out EPISODE.onnx`
EPISODES.jsonl  what `metazoa eval RUN --data DATA` wrote beside its result: for each episode its classes,
                the support and query images of each class (places in the folder's sorted names), the answers
IMAGES          the folder with one folder a class: DATA/SPLIT

Every single answer must be the same, but where two classes are as near as float32 can tell: those are counted
and shown. Exit code 0: all the same. Needs numpy, onnxruntime and Pillow. The images must have the
model's size (nothing is resized here, so that the comparison is about the model alone).
"""
import argparse
import json
import os
import pathlib
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from PIL import Image  # noqa: E402

# Two classes count as equally near below this share of the larger distance (float32, sums of a few hundred terms).
TIE = 1e-4
SUFFIXES = (".png", ".jpg", ".jpeg")


def load_class(folder):
    """All images of one class, [n, 3, h, w] in 0..1, in order of their names."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    images = [np.asarray(Image.open(file).convert("RGB"), np.float32) / 255 for file in files]
    return np.stack(images).transpose(0, 3, 1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("images", type=pathlib.Path)
    parser.add_argument("--episodes", type=int, help="only the first N")
    arguments = parser.parse_args()

    session = onnxruntime.InferenceSession(arguments.model, providers=["CPUExecutionProvider"])
    classes = {folder.name: load_class(folder) for folder in sorted(arguments.images.iterdir()) if folder.is_dir()}
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()][: arguments.episodes]
    if not rows:
        sys.exit("no episodes")

    same = ties = wrong = right = 0
    for row in rows:
        way = len(row["classes"])
        support = np.concatenate([classes[name][places] for name, places in zip(row["classes"], row["support"])])
        query = np.concatenate([classes[name][places] for name, places in zip(row["classes"], row["query"])])
        labels = np.repeat(np.arange(way), [len(places) for places in row["support"]])
        truth = np.repeat(np.arange(way), [len(places) for places in row["query"]])
        (logits,) = session.run(
            ["logits"], {"support_images": support, "support_labels": labels.astype(np.int64), "query_images": query}
        )
        assert logits.shape == (len(query), way), logits.shape
        answers = logits.argmax(1)
        right += int((answers == truth).sum())
        for place, (ours, theirs) in enumerate(zip(answers, row["answers"], strict=True)):
            if ours == theirs:
                same += 1
                continue
            gap = abs(logits[place, ours] - logits[place, theirs]) / max(abs(logits[place]).max(), 1e-30)
            ties, wrong = (ties + 1, wrong) if gap < TIE else (ties, wrong + 1)
            print(f"episode {row['episode']} query {place}: python {ours}, metazoa {theirs}, gap {gap:.1e}")
    total = same + ties + wrong
    print(f"{len(rows)} episodes, {total} answers: {same} the same, {ties} ties, {wrong} different; accuracy {right / total:.4f}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
