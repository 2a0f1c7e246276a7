#!/usr/bin/env python3
"""How often models that never saw a recovered image give it the class it was recovered for.

    agreement.py RUN ZOO

RUN  a run folder of `metazoa train`; its images are RUN/bank/*.safetensors
ZOO  models with sidecars that name classes (`id2label`), among them some that share class names with the models
     of RUN. A model judges the images of another model's class when it knows that class by name.

Prints the agreement (mean over judged image and judge pairs) and what chance would give. Needs numpy, onnxruntime and
PyYAML. Float NCHW models only; images must have the models' size.
"""
import argparse
import json
import os
import pathlib
import struct

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import yaml  # noqa: E402


def recovered(path):
    """Model, class names, images [n, 3, h, w] in 0..1 and the class of each."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    words = json.loads(header["__metadata__"]["metazoa"])

    def tensor(name, dtype):
        start, end = header[name]["data_offsets"]
        return np.frombuffer(body[start:end], dtype).reshape(header[name]["shape"])

    images = tensor("images", np.uint8).astype(np.float32) / 255
    return words["model"], words["labels"].split("\n"), images, tensor("classes", np.float32).astype(int)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("zoo", type=pathlib.Path)
    args = parser.parse_args()
    judges = []
    for path in sorted(args.zoo.glob("*.yaml")):
        sidecar = yaml.safe_load(path.read_text())
        block = sidecar.get("preprocess", {})
        if block.get("layout", "nchw") != "nchw" or block.get("dtype", "float32") != "float32":
            continue
        session = onnxruntime.InferenceSession(path.with_suffix(".onnx"))
        names = [sidecar["id2label"][i] for i in range(len(sidecar["id2label"]))]
        mean, std = (np.float32(block[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
        low, high = block.get("value_range", [0, 1])
        judges.append((path.stem, names, session, lambda x, a=(mean, std, low, high): (a[2] + x * (a[3] - a[2]) - a[0]) / a[1]))
    right, chance, pairs = 0, 0.0, 0
    for path in sorted(args.run.glob("bank/*.safetensors")):
        model, labels, images, classes = recovered(path)
        for judge, names, session, prepare in judges:
            shared = [i for i, label in enumerate(labels) if label in names]
            if judge == model or not shared:
                continue
            chosen = np.isin(classes, shared)
            (logits,) = session.run([session.get_outputs()[0].name],
                                    {session.get_inputs()[0].name: prepare(images[chosen])})
            wanted = np.array([names.index(labels[c]) for c in classes[chosen]])
            right += int((logits.argmax(1) == wanted).sum())
            chance += len(wanted) / len(names)
            pairs += len(wanted)
    if not pairs:
        raise SystemExit("no model of the zoo knows a class of another one by name")
    print(f"agreement {100 * right / pairs:.1f} % of {pairs} judgements (chance {100 * chance / pairs:.1f} %)")


if __name__ == "__main__":
    main()
