"""Pickled few-shot benchmarks as folders: python unpack_pickles.py FILE... --out FOLDER

Writes FOLDER/SPLIT/CLASS/NNNNN.png, which `metazoa eval --data FOLDER --split SPLIT` reads. The split is the part of the file's
name that says train, val or test. Read are

* {"data" or "images" or "image_data": uint8 [n, height, width, 3], "labels": n of them}, a numpy archive (.npz) or a pickle:
  CIFAR_FS_train.pickle, FC100_test.pickle, miniImageNet_category_split_val.pickle;
* {"image_data": ..., "class_dict": {class: indices}}: mini-imagenet-cache-test.pkl;
* a list of encoded PNGs beside its labels: test_images_png.pkl with test_labels.pkl of tieredImageNet. Name the images' file.

Unpickling runs whatever the file says: only for files that you trust. Needs numpy and Pillow. Tried on files of these forms with
a few pictures each (tests of this repository do not run Python).
"""
import argparse
import io
import pathlib
import pickle
import re
import sys

import numpy
from PIL import Image


def load(path: pathlib.Path):
    if path.suffix == ".npz":
        with numpy.load(path) as archive:
            return {name: archive[name] for name in archive.files}
    with path.open("rb") as file:
        # latin1: pickles of Python 2 hold their arrays as text.
        return pickle.load(file, encoding="latin1")


def split_of(path: pathlib.Path) -> str:
    found = re.search(r"(train|val|test)", path.name)
    if not found:
        sys.exit(f"error: no train, val or test in the name of `{path}`")
    return found.group(1)


def labels_beside(path: pathlib.Path) -> list:
    """Labels of `X_images_png.pkl`, in `X_labels.pkl`."""
    beside = path.with_name(path.name.replace("_images_png", "_labels"))
    if beside == path or not beside.is_file():
        sys.exit(f"error: `{path}` holds pictures without labels, and `{beside}` is not there")
    content = load(beside)
    for key in ("label_specific_str", "labels", "label_specific"):
        if key in content:
            return list(content[key])
    sys.exit(f"error: no labels in `{beside}`: it holds {sorted(content)}")


def pictures(path: pathlib.Path):
    """Pairs of a class's name and a picture."""
    content = load(path)
    if isinstance(content, (list, tuple)):
        labels = labels_beside(path)
        if len(labels) != len(content):
            sys.exit(f"error: `{path}` has {len(content)} pictures and {len(labels)} labels")
        for label, encoded in zip(labels, content):
            yield label, Image.open(io.BytesIO(bytes(numpy.asarray(encoded, numpy.uint8))))
        return
    data = next((content[key] for key in ("data", "images", "image_data") if key in content), None)
    if data is None:
        sys.exit(f"error: no pictures in `{path}`: it holds {sorted(map(str, content))}")
    if "class_dict" in content:
        pairs = [(name, index) for name, own in content["class_dict"].items() for index in own]
    elif "labels" in content:
        names = content.get("class_names")
        text = lambda label: str(label) if names is None else str(names[int(label)])
        pairs = [(text(label), index) for index, label in enumerate(content["labels"])]
    else:
        sys.exit(f"error: no labels in `{path}`: it holds {sorted(map(str, content))}")
    for name, index in pairs:
        yield name, Image.fromarray(numpy.asarray(data[index], numpy.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    for path in arguments.files:
        split, counts = split_of(path), {}
        for name, picture in pictures(path):
            # A class's name becomes a folder's.
            name = re.sub(r"[^\w .-]", "_", str(name)).strip(". ") or "class"
            folder = arguments.out / split / name
            if name not in counts:
                folder.mkdir(parents=True, exist_ok=True)
            number = counts[name] = counts.get(name, -1) + 1
            picture.convert("RGB").save(folder / f"{number:05}.png")
        print(f"{path}: {len(counts)} classes, {sum(counts.values()) + len(counts)} pictures in {arguments.out / split}")


if __name__ == "__main__":
    main()
