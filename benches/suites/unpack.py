"""Real training images of ../shared/data as a folder a class: python unpack.py META_TRAIN.npz OUT

The archive holds `images` (uint8 [n, height, width, 3]), `labels` and `class_names` by label; OUT becomes OUT/CLASS/NNN.png, what
`metazoa eval --real-data` and `real_data` of a suite take. Needs numpy and Pillow.
"""
import pathlib
import sys

import numpy
from PIL import Image


def main(archive: str, out: str) -> None:
    data = numpy.load(archive)
    labels = data["labels"]
    names = [str(name) for name in data["class_names"]]
    classes = numpy.unique(labels)
    for label in classes:
        name = names[int(label)]
        folder = pathlib.Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(data["images"][labels == label]):
            Image.fromarray(image).save(folder / f"{number:03}.png")
    print(f"{len(classes)} classes, {len(labels)} images in {out}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
