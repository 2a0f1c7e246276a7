"""Pre-trains a zoo as the papers do: python pretrain_zoo.py DATA --out ZOO [--models 100 --arch conv4 --size 84 ...]

DATA is a few-shot benchmark's folder (DATA/train/CLASS/*.png, DATA/meta_train/CLASS/*.jpg) or a folder of classes. Each model learns
a random N-way task of the training classes (PURER, BiDf-MKD, FREE: 5 ways, 100 models, 60 epochs of batches of 128, 80 % of a
class's images; the other 20 % give the accuracy in its sidecar), with the published optimisers: Conv4 by Adam at 0.01 (its rate
stays, or with --milestones purer falls as the ResNets' does), ResNets by SGD at 0.01 with momentum 0.9 and weight decay 5e-4, the
rate times 0.2 after a half, two thirds and five sixths of the epochs; gradients are cut at norm 50. Several --arch are chosen from
at random (SH); for many domains (MH) call it once for each DATA with the same --out and another --name. Models that are there
already are skipped, so a stopped call goes on.

Each file keeps its BatchNormalization (dynamo=True, optimize=False; or --exporter torchscript with TrainingMode.PRESERVE): both
default exports of PyTorch fold it away, and its statistics are what recovery lives on. The script fails when a layer got lost.

Needs torch, onnx, onnxscript, numpy, Pillow (CPU is enough for Conv4). Run by hand on 2026-11-22 with torch 2.15.0, onnx 1.23.2, on
a folder DATA/train of 16 classes of 60 glyphs each:
    python examples/pretrain_zoo.py DATA --out ZOO --models 2 --arch conv4 --size 84 --steps 3 --batch 16
    python examples/pretrain_zoo.py DATA --out ZOO --models 3 --arch conv4 resnet10 resnet18 --size 84 --steps 3
      (stopped after a ResNet-10 and a ResNet-18)
    python examples/pretrain_zoo.py DATA --out ZOO --name ts --models 1 --arch conv4 --size 32 --steps 40 --exporter torchscript
      --normalise cifar
`metazoa inspect` read each file as a white box with 4, 12 and 20 layers with statistics; the last one knew 82 % of the images held
out. No model was trained to the end, and no paper's figure was repeated, with it.
"""
import argparse
import json
import os
import pathlib
import random
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy
import onnx
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

PICTURES = {".png", ".jpg", ".jpeg"}
# Mean and standard deviation of the channels, as the published programs have them.
NORMALISATIONS = {
    "cifar": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, BatchNormalization, ReLU and 2x2 max pooling; 32 channels in the published programs."""

    def __init__(self, ways: int, size: int, width: int):
        super().__init__()
        layers, channels = [], 3
        for _ in range(4):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width * (size // 16) ** 2, ways)

    def forward(self, images):
        return self.head(self.body(images).flatten(1))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity()
        if channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images):
        return functional.relu(self.second(self.first(images)) + self.shortcut(images))


class ResNet(nn.Module):
    """Four stages of 64 to 512 channels behind a 3x3 stem without pooling."""

    def __init__(self, ways: int, blocks: int):
        super().__init__()
        layers, channels = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)], 64
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(blocks):
                layers.append(Block(channels, width, 2 if block == 0 and stage > 0 else 1))
                channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(512, ways)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def network(arch: str, ways: int, size: int, width: int) -> nn.Module:
    if arch == "conv4":
        return Conv4(ways, size, width)
    return ResNet(ways, {"resnet10": 1, "resnet18": 2}[arch])


def class_folders(data: pathlib.Path) -> list:
    """The folders of the training classes, in order of their names."""
    for split in ("train", "meta_train", "base", "images_background"):
        if (data / split).is_dir():
            data = data / split
            break
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    folders = [path for path in folders if any(file.suffix.lower() in PICTURES for file in path.rglob("*"))]
    if not folders:
        sys.exit(f"error: no class folders with pictures in `{data}`: expected DATA/train/CLASS/*.png or DATA/CLASS/*.png")
    return folders


def read_class(folder: pathlib.Path, size: int) -> numpy.ndarray:
    """All pictures of a class, uint8 [n, 3, size, size]."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    images = [Image.open(file).convert("RGB").resize((size, size), Image.BILINEAR) for file in files]
    return numpy.stack([numpy.asarray(image).transpose(2, 0, 1) for image in images])


def prepare(images: torch.Tensor, mean, std) -> torch.Tensor:
    shape = (1, 3, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, arch: str, options, normalise) -> None:
    """The published recipe; the weights after the last step are kept."""
    if arch == "conv4":
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    milestones = []
    if options.milestones == "purer" or arch != "conv4":
        milestones = [options.epochs // 2, options.epochs * 2 // 3, options.epochs * 5 // 6]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)
    model.train()
    steps = 0
    for _ in range(options.epochs):
        for batch in torch.randperm(len(images)).split(options.batch):
            if len(batch) < 2:
                continue
            loss = functional.cross_entropy(model(normalise(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 50)
            optimizer.step()
            steps += 1
            if options.steps and steps >= options.steps:
                return
        schedule.step()


def export(model: nn.Module, path: pathlib.Path, size: int, exporter: str) -> None:
    """Writes the model with every BatchNormalization as a node of its own, under its name only when that is so."""
    model.eval()
    temporary = path.with_suffix(".tmp")
    example = torch.zeros(2, 3, size, size)
    names = {"input_names": ["input"], "output_names": ["logits"], "verbose": False}
    if exporter == "dynamo":
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(model, (example,), temporary, dynamo=True, optimize=False, external_data=False,
                          dynamic_shapes=dynamic, opset_version=18, **names)
    else:
        axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(model, (example,), str(temporary), dynamo=False, do_constant_folding=False, dynamic_axes=axes,
                          training=torch.onnx.TrainingMode.PRESERVE, opset_version=17, **names)
    nodes = sum(node.op_type == "BatchNormalization" for node in onnx.load(temporary).graph.node)
    layers = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    if nodes != layers:
        temporary.unlink()
        sys.exit(f"error: {layers} BatchNormalization layers became {nodes} nodes in `{path}`: try the other --exporter")
    temporary.replace(path)


def sidecar(path: pathlib.Path, classes: list, accuracy: float, tested: int, size: int, mean, std, options, arch: str) -> None:
    """What the file does not say; JSON texts are YAML."""
    labels = ", ".join(f"{number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(classes))
    lines = [
        "schema_version: 1",
        f"model: {json.dumps(path.stem)}",
        "preprocess:",
        f"  input_size: [3, {size}, {size}]",
        "  layout: nchw",
        "  dtype: float32",
        "  value_range: [0, 1]",
        "  color: rgb",
        f"  mean: {list(mean)}",
        f"  std: {list(std)}",
        "  interpolation: bilinear",
        "output_kind: logits",
        "logits_output: logits",
        f"id2label: {{{labels}}}",
        f"tags: [{json.dumps(options.name)}, {arch}]",
        f"datasets: [{json.dumps(options.name)}]",
        f"metrics: {{accuracy: {accuracy:.4f}, images: {tested}}}",
        f"description: {json.dumps('exported: ' + options.exporter)}",
    ]
    path.with_suffix(".yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(number: int, folders: list, options) -> None:
    # A model's task, architecture and weights depend on the seed and its number alone.
    chance = random.Random(f"{options.seed}/{number}")
    arch = chance.choice(options.arch)
    path = options.out / f"{options.name}_{number:03}_{arch}.onnx"
    if options.classes == "disjoint":
        task = folders[number * options.ways:(number + 1) * options.ways]
    else:
        task = chance.sample(folders, options.ways)
    if path.is_file() and path.with_suffix(".yaml").is_file():
        print(f"{path.name}: there already", file=sys.stderr)
        return
    torch.manual_seed(chance.randrange(1 << 31))
    mean, std = NORMALISATIONS[options.normalise]
    learned, tested = [], []
    for folder in task:
        images = read_class(folder, options.size)
        first = max(1, len(images) * 4 // 5)
        learned.append(images[:first])
        tested.append(images[first:])
    pair = lambda parts: (torch.from_numpy(numpy.concatenate(parts)),
                          torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts])))
    (images, labels), (held_out, answers) = pair(learned), pair(tested)
    normalise = lambda batch: prepare(batch, mean, std)
    model = network(arch, options.ways, options.size, options.width)
    train(model, images, labels, arch, options, normalise)
    model.eval()
    with torch.no_grad():
        right = sum(int((model(normalise(part)).argmax(1) == answer).sum())
                    for part, answer in zip(held_out.split(options.batch), answers.split(options.batch)))
    accuracy = right / max(1, len(answers))
    export(model, path, options.size, options.exporter)
    sidecar(path, [folder.name for folder in task], accuracy, len(answers), options.size, mean, std, options, arch)
    print(f"{path.name}: accuracy {accuracy:.3f} on {len(answers)} images", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the zoo's folder")
    parser.add_argument("--name", help="beginning of the files' names [default: the folder's name]")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--arch", nargs="+", default=["conv4"], choices=["conv4", "resnet10", "resnet18"])
    parser.add_argument("--width", type=int, default=32, help="channels of Conv4")
    parser.add_argument("--size", type=int, default=84, help="side of the images; 32 for CIFAR-FS and FC100")
    parser.add_argument("--normalise", default="imagenet", choices=sorted(NORMALISATIONS))
    parser.add_argument("--classes", default="random", choices=["random", "disjoint"], help="disjoint: as PURER's own program")
    parser.add_argument("--milestones", default="none", choices=["none", "purer"], help="of Conv4's learning rate")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, help="stop each training after so many steps: only to try things out")
    parser.add_argument("--exporter", default="dynamo", choices=["dynamo", "torchscript"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.name = options.name or options.data.resolve().name
    if options.size < 16:
        sys.exit(f"error: four poolings need images of 16 or more: `--size {options.size}`")
    folders = class_folders(options.data)
    most = len(folders) // options.ways if options.classes == "disjoint" else options.models
    if len(folders) < options.ways or options.models > most:
        sys.exit(f"error: {options.models} models of {options.ways} ways need more than the {len(folders)} classes found")
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(options.models):
        make(number, folders, options)


if __name__ == "__main__":
    main()
