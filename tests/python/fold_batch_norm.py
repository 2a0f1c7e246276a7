#!/usr/bin/env python3
"""Folds BatchNormalization into the convolutions before it, as PyTorch's exporters do by default.

    fold_batch_norm.py ZOO OUT [--count N]

Writes the first N models of ZOO (by name, default 10) to OUT with their sidecars. Needs numpy and onnx.
"""
import argparse
import pathlib
import shutil

import numpy as np
import onnx
from onnx import numpy_helper


def fold(model):
    """Every BatchNormalization that alone reads a convolution; others stay."""
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    kept, renamed = [], {}
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        maker = makers.get(node.input[0]) if node.input else None
        folds = node.op_type == "BatchNormalization" and maker is not None and maker.op_type == "Conv"
        if not folds or readers[node.input[0]] != 1:
            kept.append(node)
            continue
        gamma, beta, mean, var = (constants[name] for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        scale = gamma / np.sqrt(var + epsilon)
        weight, bias = f"{maker.name}.folded.weight", f"{maker.name}.folded.bias"
        old = constants[maker.input[2]] if len(maker.input) > 2 else np.zeros_like(mean)
        constants[weight] = (constants[maker.input[1]] * scale[:, None, None, None]).astype(np.float32)
        constants[bias] = ((old - mean) * scale + beta).astype(np.float32)
        maker.input[:] = [maker.input[0], weight, bias]
        renamed[node.output[0]] = maker.output[0]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items() if k in used)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.zoo.glob("*.onnx"))[: args.count]:
        onnx.save(fold(onnx.load(path)), args.out / path.name)
        if path.with_suffix(".yaml").exists():
            shutil.copy(path.with_suffix(".yaml"), args.out)


if __name__ == "__main__":
    main()
