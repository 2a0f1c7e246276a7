#!/usr/bin/env python3
"""PURER, FREE and BiDf-MKD in plain PyTorch, beside ours: same models, same learner, same budgets, one run.

    methods.py ZOO --data IMAGES [--binary target/debug/metazoa] [--methods purer free bidf-mkd] [--models 10]
               [--steps 600] [--budget 200000] [--seeds 0] [--split meta_val] [--episodes 600]

ZOO holds Conv4 classifiers of 32x32 images with their BatchNormalization (../shared/data/zoo_ss). Each method is written
from methods.md as its paper means it, with the settings that ours has by default (ProtoNet with Conv4-32, 5-way 5-shot
7-query, colours mixed at random), so that what is compared is the program, not the recipe. PyTorch runs eager, with as many
threads as there are processors; BiDf-MKD asks its models through ONNX Runtime, as ours does. By turns: reference, ours.

What is left out of the reference: nothing that changes what is learned. What it has not: resuming, budgets to the query
(it stops after the visit that crosses the budget), models of other shapes.

Needs PyTorch, onnx, onnxruntime, numpy, pillow. Times are wall-clock: leave the machine alone.
"""
import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before onnxruntime is imported

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
WAY, SHOT, QUERY = 5, 5, 7
MIDDLE, UNIT = 0.5, 0.25


class Conv4(nn.Module):
    def __init__(self, width=32, classes=None):
        super().__init__()
        layers, channels = [], 3
        for _ in range(4):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width * 4, classes) if classes else nn.Identity()

    def forward(self, x):
        return self.head(self.body((x - MIDDLE) / UNIT).flatten(1))


class Generator(nn.Module):
    """methods.md 1.3."""

    def __init__(self, features, latent=256):
        super().__init__()
        wide = 2 * features
        self.wide, self.base, self.norm = wide, nn.Linear(latent, wide * 64), nn.BatchNorm2d(wide)
        layers = []
        for channels in (wide, features):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, channels, 3, padding=1, bias=False),
                       nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(features, 3, 3, padding=1), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, 0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, z):
        return self.layers(self.norm(self.base(z).view(-1, self.wide, 8, 8)))


class Teacher:
    """A classifier whose gradients are exact, with taps at its normalisations."""

    def __init__(self, path):
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        try:
            self.classes = len(arrays["head.bias"])
            self.net = Conv4(len(arrays["body.0.bias"]), self.classes).eval()
            state = {name: torch.tensor(arrays[name]) for name in self.net.state_dict() if "num_batches" not in name}
        except KeyError as missing:
            sys.exit(f"{path}: not a Conv4 with its BatchNormalization, it has no {missing}")
        self.net.load_state_dict(state, strict=False)
        self.net.requires_grad_(False)
        # The file is the judge of what was read out of it.
        probe = torch.rand(4, 3, 32, 32)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        wanted = session.run(None, {session.get_inputs()[0].name: ((probe - MIDDLE) / UNIT).numpy()})[0]
        gap = np.abs(wanted - self.net(probe).numpy()).max()
        if gap > 1e-3:
            sys.exit(f"{path}: PyTorch's network differs from the file by {gap:.1e}")
        self.gaps = []
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.tap)

    def tap(self, module, inputs, _):
        x = inputs[0]
        self.gaps.append((x.mean((0, 2, 3)) - module.running_mean).norm()
                         + (x.var((0, 2, 3), unbiased=False) - module.running_var).norm())

    def statistics(self):
        total, self.gaps = sum(self.gaps) / max(len(self.gaps), 1), []
        return total

    def __call__(self, x):
        self.gaps = []
        return self.net(x)


class Asked:
    """A classifier that can only be asked."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name, self.queries = self.session.get_inputs()[0].name, 0
        self.classes = self.session.get_outputs()[0].shape[1]

    def __call__(self, x):
        self.queries += len(x)
        values = ((x - MIDDLE) / UNIT).numpy()
        return torch.cat([torch.from_numpy(self.session.run(None, {self.name: part})[0])
                          for part in np.array_split(values, max(1, math.ceil(len(values) / 128)))])


# The learner.


def rolled(x):
    """A shift of two pixels at most, each way."""
    dy, dx = np.random.randint(-2, 3, 2)
    return torch.roll(x, (int(dy), int(dx)), (2, 3))


def mixed_colours(x):
    """A 3x3 matrix and an offset an image, and a shift of two pixels."""
    n = len(x)
    matrix = torch.eye(3) + 0.4 * torch.randn(n, 3, 3)
    return rolled(torch.einsum("nij,njhw->nihw", matrix, x) + 0.1 * torch.randn(n, 3, 1, 1))


def answers(net, support, query, shares):
    """ProtoNet's logits; `shares` [n, way] say what of each support image belongs to each class."""
    features = net(torch.cat([support, query]))
    own, asked = features[:len(support)], features[len(support):]
    means = (shares / shares.sum(0, keepdim=True)).T @ own
    return -torch.cdist(asked, means).pow(2) * 16 / features.shape[1]


def one_hot(labels, way):
    return F.one_hot(labels, way).float()


class Memory:
    """Images by (model, class)."""

    def __init__(self):
        self.images = {}

    def add(self, model, images, labels, most):
        for label in labels.unique().tolist():
            own = torch.cat([self.images.get((model, label), images[:0]), images[labels == label]])
            self.images[(model, label)] = own[-most:]

    def ready(self):
        return [key for key, images in self.images.items() if len(images) >= SHOT + QUERY]

    def episode(self):
        keys = self.ready()
        chosen = [keys[i] for i in np.random.permutation(len(keys))[:WAY]]
        drawn = [(key, torch.from_numpy(np.random.permutation(len(self.images[key]))[:SHOT + QUERY])) for key in chosen]
        images = [self.images[key][index] for key, index in drawn]
        return torch.cat([i[:SHOT] for i in images]), torch.cat([i[SHOT:] for i in images]), drawn


class Learner:
    def __init__(self, steps):
        self.net, self.steps, self.step = Conv4(), steps, 0
        self.adam = torch.optim.Adam(self.net.parameters(), 2e-3)
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, steps)

    def follow(self, loss):
        self.adam.zero_grad()
        loss.backward()
        self.advance()

    def advance(self):
        self.adam.step()
        self.cosine.step()
        self.step += 1

    def distilled(self, support, query, shares, wanted):
        """KL(`wanted` || answers) on the queries; both are logits."""
        self.net.train()
        logits = answers(self.net, mixed_colours(support), mixed_colours(query), shares)
        return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")

    def replay(self, support, query):
        """One update on wanted classes; the share that was right."""
        self.net.train()
        loss, right = self.outer(support, query)
        self.follow(loss)
        return right

    def outer(self, support, query):
        """Cross-entropy of an episode's queries, and the share that is right."""
        labels = torch.arange(WAY).repeat_interleave(QUERY)
        shares = one_hot(torch.arange(WAY).repeat_interleave(SHOT), WAY)
        logits = answers(self.net, mixed_colours(support), mixed_colours(query), shares)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean().item()


def boundary(teacher_logits, student_logits):
    """-1[agree] KL(teacher || student), by image."""
    t, s = teacher_logits.log_softmax(1), student_logits.log_softmax(1)
    agree = (t.argmax(1) == s.argmax(1)).float()
    return -agree * (t.exp() * (t - s)).sum(1)


# PURER (methods.md 2).


def total_variation(x):
    return (x[:, :, 1:] - x[:, :, :-1]).abs().mean() + (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()


def pixel_loss(teacher, z, labels):
    logits = teacher(rolled(MIDDLE + UNIT * z))
    return F.cross_entropy(logits, labels) + 0.2 * teacher.statistics() + 1e-3 * total_variation(z) + 1e-5 * z.norm()


def purer(paths, arguments):
    teachers, banks, begin = [Teacher(path) for path in paths], [], time.perf_counter()
    for teacher in teachers:
        labels = torch.arange(teacher.classes).repeat_interleave(SHOT + QUERY)
        z = torch.randn(len(labels), 3, 32, 32, requires_grad=True)
        adam = torch.optim.Adam([z], 0.1, betas=(0.5, 0.99))
        for step in range(150):
            adam.param_groups[0]["lr"] = 0.1 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / 150)))
            adam.zero_grad()
            pixel_loss(teacher, z, labels).backward()
            adam.step()
            z.data.clamp_(-2, 2)
        banks.append((z, labels, torch.optim.Adam([z], 0.002 / UNIT, betas=(0.5, 0.99))))
    recover, learner = time.perf_counter() - begin, Learner(arguments.steps)
    classes = [(model, label) for model, (_, labels, _) in enumerate(banks) for label in labels.unique().tolist()]
    best, since = 0.0, 0
    while learner.step < learner.steps:
        chosen = [classes[i] for i in np.random.permutation(len(classes))[:WAY]]
        rows = [MIDDLE + UNIT * banks[model][0][banks[model][1] == label] for model, label in chosen]
        support, query = torch.cat([r[:SHOT] for r in rows]), torch.cat([r[SHOT:] for r in rows])
        model = np.random.randint(len(banks))
        z, labels, adam = banks[model]
        adam.zero_grad()
        pixel_loss(teachers[model], z, labels).backward()
        if since >= 6 and learner.step >= 200:
            # Harder for the learner, end to end: ascent on its outer loss.
            for own, _, _ in banks:
                own.grad = own.grad if own is z else None
            (-10 * learner.outer(support, query)[0]).backward()
            for other, (own, _, optimiser) in enumerate(banks):
                if own.grad is not None and other != model:
                    optimiser.step()
            since = 0
        adam.step()
        z.data.clamp_(-2, 2)
        accuracy = learner.replay(support.detach(), query.detach())
        best, since = (accuracy, 0) if accuracy > best else (best, since + 1)
    return learner.net, recover, 0


# FREE (methods.md 4), and the visits that BiDf-MKD shares with it.


class Shared:
    """One generator for all models."""

    def __init__(self):
        self.generator = Generator(16)
        self.adam = torch.optim.Adam(self.generator.parameters(), 2e-3, betas=(0.5, 0.999))

    def clone(self):
        own = Generator(16)
        own.load_state_dict(self.generator.state_dict())
        return own

    def learn(self, told):
        for parameter, gradients in zip(self.generator.parameters(), zip(*told)):
            parameter.grad = sum(gradients) / len(gradients)
        self.adam.step()

    def visit(self, labels, gradient):
        """Five steps of a clone and its latents down `gradient(images)`; images and the last step's gradient."""
        clone, z = self.clone(), torch.randn(len(labels), 256, requires_grad=True)
        adam = torch.optim.Adam([{"params": clone.parameters(), "lr": 1e-3}, {"params": [z], "lr": 0.1}], betas=(0.5, 0.999))
        for _ in range(5):
            adam.zero_grad()
            images = clone(z)
            images.backward(gradient(images.detach()))
            adam.step()
        with torch.no_grad():
            return clone(z).detach(), [parameter.grad for parameter in clone.parameters()]


def exact(teacher, labels, student=None):
    def gradient(images):
        images = images.requires_grad_()
        shown = rolled(images)
        logits = teacher(shown)
        loss = F.cross_entropy(logits, labels) + teacher.statistics()
        if student is not None:
            loss = loss + boundary(logits, student(shown)).mean()
        return torch.autograd.grad(loss, images)[0]
    return gradient


def turns(count, size=4):
    """Models in random order, nobody again before all had their turn."""
    while True:
        order = np.random.permutation(count).tolist()
        for at in range(0, count, size):
            yield order[at:at + size]


def replayed(learner, memory, patience=40):
    best, since = 0.0, 0
    while learner.step < learner.steps and since < patience:
        if len(memory.ready()) < WAY:
            return
        support, query, _ = memory.episode()
        accuracy = learner.replay(support, query)
        best, since = (accuracy, 0) if accuracy > best else (best, since + 1)


def student_of(net, support, labels, shares=None):
    shares = one_hot(labels, int(labels.max()) + 1) if shares is None else shares
    return lambda images: answers(net, support, images, shares)


def free(paths, arguments):
    teachers, shared, memory = [Teacher(path) for path in paths], Shared(), Memory()
    learner, recover, round_number = Learner(arguments.steps), 0.0, 0
    for chosen in turns(len(teachers)):
        if learner.step >= learner.steps:
            break
        begin, told, visits = time.perf_counter(), [], []
        for model in chosen:
            teacher = teachers[model]
            labels = torch.arange(teacher.classes).repeat_interleave(8)
            student = None
            if all((model, c) in memory.images for c in range(teacher.classes)):
                shown = torch.cat([memory.images[(model, c)][-SHOT:] for c in range(teacher.classes)])
                student = student_of(learner.net, shown, torch.arange(teacher.classes).repeat_interleave(SHOT))
            images, gradients = shared.visit(labels, exact(teacher, labels, student))
            told.append(gradients)
            visits.append((model, images, labels))
        shared.learn(told)
        recover += time.perf_counter() - begin
        round_number += 1
        if round_number <= 20:
            continue
        for model, images, labels in visits:
            memory.add(model, images, labels, 64)
        # BELL: a step for each model, after each other; the outer optimiser follows the way back.
        start = [p.detach().clone() for p in learner.net.parameters()]
        for model, images, labels in [visits[i] for i in np.random.permutation(len(visits))]:
            first = torch.arange(len(labels)) % 8 < 4
            with torch.no_grad():
                soft = teachers[model](images[~first])
            loss = learner.distilled(images[first], images[~first], one_hot(labels[first], teachers[model].classes), soft)
            gradients = torch.autograd.grad(loss, list(learner.net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(learner.net.parameters(), gradients):
                    parameter -= 0.1 * gradient
        with torch.no_grad():
            for parameter, own in zip(learner.net.parameters(), start):
                parameter.grad = (own - parameter) / (0.1 * len(visits))
                parameter.copy_(own)
        learner.advance()
        replayed(learner, memory)
    return learner.net, recover, 0


# BiDf-MKD (methods.md 3).


def estimated(asked, labels, student=None, directions=20, radius=0.005):
    """Forward differences along random directions of the unit sphere (methods.md 3.1)."""
    def losses(images, labels, student_logits):
        logits = asked(images)
        loss = F.cross_entropy(logits.double(), labels, reduction="none")
        return loss if student_logits is None else loss + boundary(logits.double(), student_logits.double())

    def gradient(images):
        n, own = len(images), None
        if student is not None:
            with torch.no_grad():
                own = student(images)
        here = losses(images, labels, own)
        u = torch.randn(n, directions, 3 * 32 * 32)
        u /= u.norm(dim=2, keepdim=True)
        moved = (images.view(n, 1, -1) + radius * u).view(-1, 3, 32, 32)
        there = losses(moved, labels.repeat_interleave(directions), None if own is None else own.repeat_interleave(directions, 0))
        slope = ((there.view(n, directions) - here.view(n, 1)) / radius).float()
        return (slope.unsqueeze(2) * u).sum(1).view_as(images) * (3072 / directions) / n
    return gradient


def bidf(paths, arguments):
    asked, shared, memory = [Asked(path) for path in paths], Shared(), Memory()
    learner, recover = Learner(arguments.steps), 0.0
    for chosen in turns(len(asked)):
        if learner.step >= learner.steps or sum(a.queries for a in asked) >= arguments.budget:
            break
        begin, told, visits = time.perf_counter(), [], []
        for model in chosen:
            labels = torch.arange(asked[model].classes).repeat_interleave(8)
            support, gradients = shared.visit(labels, estimated(asked[model], labels))
            told.append(gradients)
            first = torch.arange(len(labels)) % 8 < 4
            soft = asked[model](support)
            student = student_of(learner.net, support[first], labels[first], soft[first].softmax(1))
            query, gradients = shared.visit(labels, estimated(asked[model], labels, student))
            told.append(gradients)
            visits.append((model, labels, first, support, soft, query, asked[model](query)))
        shared.learn(told)
        recover += time.perf_counter() - begin
        learner.adam.zero_grad()
        for model, labels, first, support, soft, query, wanted in visits:
            loss = learner.distilled(support[first], query, soft[first].softmax(1), wanted)
            (loss / len(visits)).backward()
            memory.add(model, support, labels, 64)
            memory.add(model, query, labels, 64)
        learner.advance()
        replayed(learner, memory)
    while learner.step < learner.steps:
        replayed(learner, memory, learner.steps)
    return learner.net, recover, sum(a.queries for a in asked)


# Evaluation: real episodes, running statistics.


def real_images(folder):
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        sys.exit(f"{folder}: no folders of classes")
    def read(path):
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
    return [torch.stack([read(path) for path in sorted(c.iterdir()) if path.suffix in (".png", ".jpg")]) for c in classes]


@torch.no_grad()
def evaluate(net, classes, shot, episodes, query=15):
    net.eval()
    features = [torch.cat([net(part) for part in images.split(256)]) for images in classes]
    rng, found = np.random.default_rng(1), []
    for _ in range(episodes):
        chosen = rng.permutation(len(classes))[:WAY]
        drawn = [features[c][rng.permutation(len(features[c]))[:shot + query]] for c in chosen]
        means = torch.stack([rows[:shot].mean(0) for rows in drawn])
        asked = torch.cat([rows[shot:] for rows in drawn])
        right = torch.cdist(asked, means).argmin(1) == torch.arange(WAY).repeat_interleave(query)
        found.append(right.float().mean().item())
    return 100 * statistics.mean(found), 196 * statistics.stdev(found) / math.sqrt(episodes)


def ours(method, seed, arguments, out):
    settings = [f"meta.steps={arguments.steps}", f"max_models={arguments.models}", "recover.images_per_class=12"]
    if method == "bidf-mkd":
        settings += ["access=black-box", f"recover.black_box.run_budget={arguments.budget}"]
    command = [arguments.binary, "train", arguments.zoo, "--method", method, "--out", str(out), "--seed", str(seed), "--json", "--no-progress"]
    for setting in settings:
        command += ["-s", setting]
    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)
    trained = run(command)
    found = [run([arguments.binary, "eval", str(out), "--data", arguments.data, "--split", arguments.split, "--shot", str(shot),
                  "--episodes", str(arguments.episodes), "--seed", "0", "--json", "--no-progress"]) for shot in (1, 5)]
    accuracy = [(100 * one["accuracy"], 100 * one["ci95"]) for one in found]
    return trained["seconds"]["total"], trained["seconds"]["recover"], trained["queries"], accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoo")
    parser.add_argument("--data", required=True)
    parser.add_argument("--binary", default=str(ROOT / "target/debug/metazoa"))
    parser.add_argument("--methods", nargs="+", default=["purer", "free", "bidf-mkd"], choices=["purer", "free", "bidf-mkd"])
    parser.add_argument("--models", type=int, default=10)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--budget", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", default="meta_val")
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # In the order in which ours takes them.
    paths = sorted(pathlib.Path(arguments.zoo).glob("*.onnx"))[:arguments.models]
    if not paths:
        sys.exit(f"{arguments.zoo}: no .onnx files")
    classes = real_images(pathlib.Path(arguments.data) / arguments.split)
    made = {"purer": purer, "free": free, "bidf-mkd": bidf}
    print(f"PyTorch {torch.__version__}, {arguments.threads} threads; {len(paths)} models, {arguments.steps} steps, "
          f"{arguments.split}, {arguments.episodes} episodes\n")
    print("| method | seed | program | seconds | of them recovery | queries | 1 shot | 5 shots |\n|---|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        for method in arguments.methods:
            torch.manual_seed(seed)
            np.random.seed(seed)
            begin = time.perf_counter()
            net, recover, queries = made[method](paths, arguments)
            total = time.perf_counter() - begin
            found = [evaluate(net, classes, shot, arguments.episodes) for shot in (1, 5)]
            with tempfile.TemporaryDirectory() as folder:
                own = ours(method, seed, arguments, pathlib.Path(folder) / "run")
            for name, (seconds, part, asked, accuracy) in [("PyTorch", (total, recover, queries, found)), ("ours", own)]:
                shown = " | ".join(f"{value:.1f} ± {interval:.1f}" for value, interval in accuracy)
                print(f"| {method} | {seed} | {name} | {seconds:.0f} | {part:.0f} | {asked:,} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
