#!/usr/bin/env python3
"""How far ONNX Runtime's own output moves when the input moves by one rounding.

    conditioning.py FILE [SEEDS]

FILE   a graph without weights, of ../shared/fixtures/architectures; filled by its hydrate.py with each of SEEDS seeds (8)

Prints for each seed the relative change of the output when every pixel is multiplied by 1 + 1e-7 N(0, 1): what two right
programs may differ by with those weights. Needs numpy, onnx and onnxruntime.
"""
import os
import pathlib
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402


def main():
    path = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(path.parent.parent))
    from hydrate import hydrate

    for seed in range(int(sys.argv[2]) if len(sys.argv) > 2 else 8):
        model = hydrate(onnx.load(path), seed)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        draw = np.random.default_rng(0)
        images = draw.random([1, *first.shape[1:]]).astype(np.float32)
        moved = images * (1 + 1e-7 * draw.standard_normal(images.shape)).astype(np.float32)
        here, there = (session.run(None, {first.name: x})[0] for x in (images, moved))
        print(f"seed {seed}: {np.linalg.norm(here - there) / np.linalg.norm(here):.1e}")


if __name__ == "__main__":
    main()
