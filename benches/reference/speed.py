#!/usr/bin/env python3
"""Every row of the speed table against PyTorch, measured in turns on this machine.

    speed.py [--threads N] [--rounds R] [--steps S] [--quick] [--compile [--compile-limit S]] [--large] [--write] [ROW...]
    speed.py --list

A round of a row is S steps of ours, then S steps of each way PyTorch has: eager NCHW, eager channels-last and, with
--compile, torch.compile (inductor; a C++ compiler and minutes of warm-up a row). What is compared is the median over all
rounds, and PyTorch's is that of its best way. Same batch, threads, loss. --write puts the rows into benches/RESULTS.md;
rows not run now stay as they are there. --quick takes 2 rounds of 2 steps; --large adds the episodes at 84x84. The machine
must be idle: PyTorch's threads wait for each other, and a core lost to another program costs it more than us.

Ours is `cargo build --example speed` (target/debug/examples/speed; its head lists the cases). Networks are
../shared/fixtures/architectures, weights drawn by ../shared/fixtures/hydrate.py; files exported for 2 images are
rewritten for the row's batch, and ONNX Runtime must give the same scores for the first two of them.

What is checked, in every run, before a row is timed (the column "same"; a row that fails is not timed):
* inversion steps: PyTorch's network carries the file's weights, tensor by tensor (none missing, none left over), and takes
  the same images; the loss (cross-entropy and statistics) and the gradient to the pixels must agree.
* MAML, ProtoNet: PyTorch takes our parameters and images; the query loss must agree, and the gradient to all parameters with
  both sides in f64, to 1e-6. What is timed is f32, where five inner steps cross kinks of ReLU and max pooling on whichever side
  rounding puts them: our f32 gradient may lie twice as far from the f64 one as PyTorch's goes when its parameters move
  by 2e-6 (5 shots: PyTorch's moves by 13 % already at 1e-6).
* black box: the same file, images and version of ONNX Runtime; the scores must agree.
Not checked: the values of the generator's step (its weights cannot be set from outside; PyTorch's has the 2,328,899
parameters of methods.md 1.3, the teacher behind it is checked), and the random weights are not trained ones (no kernel here
is faster for some values than for others, but trained zeros could be). Memory: resident set at the peak of three steps
minus that before the first (VmHWM - VmRSS, the high-water mark reset between), each side in a process of its own.

Needs torch, torchvision, timm, onnx, onnxruntime, safetensors (../shared/torch-cpu/install.sh).
"""
import argparse
import datetime
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
OURS = ROOT / "target/debug/examples/speed"
RESULTS = ROOT / "benches/RESULTS.md"
sys.path.append(str(SHARED / "fixtures"))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
# Two right programs in f32: the loss and, for deep ReLU networks, the gradient (docs/architectures.md, "noise").
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 5e-2
# The same in f64; gradients are written as f32.
PRECISE_TOLERANCE = 1e-6
# Of Winograd's convolution, in units of the result's length (src/tensor/kernels/winograd).
ROUNDING = 2e-6


class Failed(Exception):
    """A row that cannot be measured; the text says why."""


# Networks, with the names of the fixtures' weights.


class Conv4(nn.Module):
    def __init__(self, width=64, classes=10):
        super().__init__()
        layers, channels = [], 3
        for _ in range(4):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.f, self.fc = nn.Sequential(*layers), nn.Linear(width * 4, classes)

    def forward(self, x):
        return self.fc(self.f(x).flatten(1))


class Block(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.b2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.sc = nn.Identity()
        if stride != 1 or channels != width:
            self.sc = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.sc(x))


class ResNet18(nn.Module):
    """With the CIFAR stem: 3x3, no pooling."""

    def __init__(self, classes=10):
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        blocks, channels = [], 64
        for width, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
            blocks.append(Block(channels, width, stride))
            channels = width
        self.l, self.fc = nn.Sequential(*blocks), nn.Linear(512, classes)

    def forward(self, x):
        return self.fc(self.l(F.relu(self.b(self.c(x)))).mean((2, 3)))


def torchvision_network(name):
    import torchvision

    return getattr(torchvision.models, name)(weights=None, num_classes=10)


def timm_network(name):
    import timm

    return timm.create_model(name, pretrained=False, num_classes=10)


# Name: PyTorch's definition, the fixture.
NETWORKS = {
    "conv4": (Conv4, "conv4.speed"),
    "resnet18": (ResNet18, "resnet18c.speed"),
    "resnet50": (lambda: torchvision_network("resnet50"), "resnet50.ts_keepbn"),
    "mobilenet_v2": (lambda: torchvision_network("mobilenet_v2"), "mobilenet_v2.ts_keepbn"),
    "densenet121": (lambda: torchvision_network("densenet121"), "densenet121.ts_keepbn"),
    "vit_tiny": (lambda: timm_network("vit_tiny_patch16_224"), "vit_tiny.ts_keepbn"),
    "convnext_tiny": (lambda: torchvision_network("convnext_tiny"), "convnext_tiny.ts_keepbn"),
}


class Generator(nn.Module):
    """methods.md 1.3, for 32x32."""

    def __init__(self, latent=256, features=64):
        super().__init__()
        self.wide = 2 * features
        self.base, self.norm = nn.Linear(latent, self.wide * 64), nn.BatchNorm2d(self.wide)
        layers = []
        for channels in (self.wide, features):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(self.wide, channels, 3, padding=1, bias=False),
                       nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(features, 3, 3, padding=1), nn.Sigmoid())

    def forward(self, z):
        return self.layers(self.norm(self.base(z).view(-1, self.wide, 8, 8)))


# Files.


def set_batch(model, batch):
    """Rewrites a file exported for a fixed number of images, in place; that number, or 0 where it is free."""
    weights = {tensor.name for tensor in model.graph.initializer}
    ports = [port for port in model.graph.input if port.name not in weights] + list(model.graph.output)
    fixed = ports[0].type.tensor_type.shape.dim[0].dim_value
    if fixed in (0, batch):
        return fixed
    for port in ports:
        port.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    attributes = [a for node in model.graph.node if node.op_type == "Constant" for a in node.attribute]
    tensors = list(model.graph.initializer) + [a.t for a in attributes if a.name == "value"]
    for tensor in tensors:
        # Shapes: the batch stands first among at least three numbers.
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1 and tensor.dims[0] >= 3:
            values = numpy_helper.to_array(tensor).copy()
            if values[0] == fixed:
                values[0] = batch
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return fixed


def scores(model, images):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def prepare(folder, name, batch):
    """Path and graph of the fixture with weights, for `batch` images, beside a sidecar that leaves pixels as they are."""
    from hydrate import hydrate

    fixture = NETWORKS[name][1]
    source = SHARED / "fixtures/architectures" / f"{fixture}.onnx"
    model = hydrate(onnx.load(source))
    sizes = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    original = onnx.ModelProto.FromString(model.SerializeToString())
    fixed = set_batch(model, batch)
    if fixed not in (0, batch):
        images = np.random.default_rng(0).random((max(batch, fixed), *sizes[1:]), dtype=np.float32)
        count = min(batch, fixed)
        distance = np.abs(scores(model, images[:batch])[:count] - scores(original, images[:fixed])[:count])
        if distance.max() > 1e-4 * np.abs(scores(original, images[:fixed])).max():
            raise Failed(f"{fixture} gives other scores when rewritten for a batch of {batch}")
    path = pathlib.Path(folder) / f"{name}-{batch}.onnx"
    onnx.save(model, path)
    path.with_suffix(".yaml").write_text(
        "schema_version: 1\npreprocess: {mean: [0, 0, 0], std: [1, 1, 1], value_range: [0, 1]}\noutput_kind: logits\n")
    return path, model.graph


def weights_by_name(graph):
    """PyTorch's names to arrays. The TorchScript exporter shares equal weights (Identity) and transposes those of linear
    layers under new names; the node's name tells whose they are."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in arrays:
            arrays[node.output[0]] = arrays[node.input[0]]
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul"):
            parts = node.name.strip("/").split("/")[:-1]
            kept = [p for p, after in zip(parts, parts[1:] + [""]) if not after.startswith(p + ".")]
            arrays[".".join(kept) + ".weight"] = arrays[node.input[1]].T
    return arrays


def load_weights(module, graph):
    """Gives the module the file's weights; every tensor must be found."""
    arrays = weights_by_name(graph)
    state = {}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in arrays or arrays[name].size != value.numel():
            raise Failed(f"the file has no weights of the size of {name}: another network")
        state[name] = torch.tensor(arrays[name]).reshape(value.shape)
    left = [tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
            and np.prod(tensor.dims) > 1 and tensor.name not in state and not tensor.name.startswith("onnx::")]
    if left:
        raise Failed(f"PyTorch's network has no place for {', '.join(left[:3])} of the file: another network")
    module.load_state_dict(state, strict=False)
    return module


# Ours.


class Ours:
    """The program, with the threads of a row."""

    def __init__(self, folder, threads):
        library = sorted(pathlib.Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))
        self.folder = pathlib.Path(folder)
        self.environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
        if library:
            self.environment["ORT_DYLIB_PATH"] = str(library[0])

    def run(self, *arguments):
        if not OURS.exists():
            raise SystemExit(f"{OURS} is missing: cargo build --example speed")
        command = [str(OURS), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise Failed("ours: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
        return [float(line) for line in done.stdout.split()]

    def values(self, *arguments):
        path = self.folder / "values.safetensors"
        self.run("--values", path, *arguments)
        return load_file(path)


def relative(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def agree(what, gap, tolerance):
    if not gap <= tolerance:
        raise Failed(f"the two sides differ: {what} by {gap:.1e}")
    return f"{what} {gap:.0e}"


# PyTorch.


class Inversion:
    """Forward in evaluation mode, cross-entropy plus the distance of each BatchNormalization input's statistics from the
    running ones, gradient to the pixels."""

    def __init__(self, module, images, layout):
        self.module = module.eval().requires_grad_(False).to(memory_format=layout)
        self.layout, self.seen = layout, []
        for part in self.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.register_forward_pre_hook(self.tap)
        self.images = images.to(memory_format=layout).requires_grad_(True)
        self.labels = torch.arange(len(images)) % 10
        self.loss = self.objective

    def tap(self, part, inputs):
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        # The faster way of each layout (Conv4-64, two cores: 63 against 79 ms, 52 against 57 ms).
        if self.layout == torch.contiguous_format:
            var = (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        else:
            var = x.var((0, 2, 3), unbiased=False)
        self.seen.append((mean - part.running_mean).norm() + (var - part.running_var).norm())

    def objective(self, images):
        self.seen.clear()
        return F.cross_entropy(self.module(images), self.labels) + sum(self.seen)

    def gradient(self):
        loss = self.loss(self.images)
        return loss, torch.autograd.grad(loss, self.images)[0]

    def compiled(self):
        self.loss = torch.compile(self.objective)
        return self.gradient


class Generating:
    """A step of generator and latents (Adam) through a frozen network, statistics included."""

    def __init__(self, module, batch, layout):
        generator = Generator()
        if sum(p.numel() for p in generator.parameters()) != 2_328_899:
            raise Failed("the generator is not that of methods.md 1.3")
        self.teacher = Inversion(module, torch.zeros(batch, 3, 32, 32), layout)
        self.generator = generator.to(memory_format=layout)
        self.latents = torch.randn(batch, 256, requires_grad=True)
        parameters = [self.latents, *generator.parameters()]
        self.adam = torch.optim.Adam(parameters, 1e-3, (0.5, 0.999), fused=True)
        self.loss = self.objective

    def objective(self, latents):
        return self.teacher.objective(self.generator(latents))

    def step(self):
        self.adam.zero_grad()
        self.loss(self.latents).backward()
        self.adam.step()

    def compiled(self):
        self.loss = torch.compile(self.objective)
        return self.step


def embed(parameters, images):
    """Conv4 of src/meta/backbone.rs, normalised by the batch at hand."""
    x = (images - 0.5) / 0.25
    for at in range(0, 16, 4):
        weight, bias, factor, offset = parameters[at:at + 4]
        x = F.conv2d(x, weight, bias, padding=1)
        x = F.max_pool2d(F.relu(F.batch_norm(x, None, None, factor, offset, True, 0.0, 1e-5)), 2)
    return x.flatten(1)


class Episode:
    """Images and parameters that ours wrote, class after class."""

    def __init__(self, values, way, layout, dtype=torch.float32):
        ordered = [values[name] for name in sorted(values) if name.startswith("parameter")]
        ordered = [p.to(dtype) for p in ordered]
        self.parameters = [(p.to(memory_format=layout) if p.dim() == 4 else p.clone()).requires_grad_(True) for p in ordered]
        self.support, self.query = (values[name].to(dtype, memory_format=layout) for name in ("support", "query"))
        self.way = way
        self.support_labels, self.query_labels = (
            torch.arange(len(images)) // (len(images) // way) for images in (self.support, self.query))
        self.loss = self.objective

    def gradient(self):
        loss = self.loss(self.parameters)
        return loss, torch.autograd.grad(loss, self.parameters)


class ProtoNet(Episode):
    def objective(self, parameters):
        embedding = embed(parameters, torch.cat([self.support, self.query]))
        support, query = embedding[:len(self.support)], embedding[len(self.support):]
        means = support.view(self.way, -1, support.shape[1]).mean(1)
        distances = query.square().sum(1, keepdim=True) - 2 * query @ means.T + means.square().sum(1)
        return F.cross_entropy(-distances * (16 / embedding.shape[1]), self.query_labels)

    def compiled(self):
        self.loss = torch.compile(self.objective)
        return self.gradient


class Maml(Episode):
    steps, rate = 5, 0.01

    def support_loss(self, parameters):
        logits = embed(parameters, self.support) @ parameters[16] + parameters[17]
        return F.cross_entropy(logits, self.support_labels)

    def objective(self, parameters, gradient=None):
        gradient = gradient or (lambda at: torch.autograd.grad(self.support_loss(at), at, create_graph=True))
        for _ in range(self.steps):
            parameters = [p - self.rate * g for p, g in zip(parameters, gradient(parameters))]
        return F.cross_entropy(embed(parameters, self.query) @ parameters[16] + parameters[17], self.query_labels)

    def compiled(self):
        # Dynamo follows the functional gradient, not torch.autograd.grad.
        inner = torch.func.grad(self.support_loss)
        self.loss = torch.compile(lambda parameters: self.objective(parameters, inner))
        return self.gradient


# Rows. A build returns what is compared: our arguments, PyTorch's ways (a function a way), what was checked.


def with_compiled(ways, make, compiling):
    if compiling:
        torch._dynamo.reset()
        ways["compiled"] = make().compiled()
    return ways


def inversion(name, batch):
    def build(ours, arguments):
        path, graph = prepare(ours.folder, name, batch)
        values = ours.values("inversion", path, batch)

        def make(layout=torch.channels_last):
            return Inversion(load_weights(NETWORKS[name][0](), graph), values["images"].clone(), layout)

        loss, gradient = make(torch.contiguous_format).gradient()
        expected = values["losses"].sum()
        same = [agree("loss", relative(loss.detach(), expected), LOSS_TOLERANCE),
                agree("gradient", relative(gradient, values["gradient"]), GRADIENT_TOLERANCE)]
        ways = {key: make(layout).gradient for key, layout in LAYOUTS.items()}
        return ["inversion", path, batch], with_compiled(ways, make, arguments.compile), ", ".join(same)

    return build


def generator(batch):
    def build(ours, arguments):
        path, graph = prepare(ours.folder, "conv4", batch)

        def make(layout=torch.channels_last):
            return Generating(load_weights(Conv4(), graph), batch, layout)

        ways = {key: make(layout).step for key, layout in LAYOUTS.items()}
        return ["generator", path, batch], with_compiled(ways, make, arguments.compile), "not compared"

    return build


def episode(kind, way, shot, size):
    def build(ours, arguments):
        case = [kind.__name__.lower(), way, shot, size]
        values = ours.values(*case)

        def make(layout=torch.channels_last):
            return kind(values, way, layout)

        def flat(gradients):
            return torch.cat([g.flatten() for g in gradients]).double()

        def written(kind):
            return flat(values[name] for name in sorted(values) if name.startswith(kind))

        loss, single = make(torch.contiguous_format).gradient()
        _, precise = kind(values, way, torch.contiguous_format, torch.float64).gradient()
        single, precise = flat(single), flat(precise)
        # Kinks of ReLU and pooling that rounding puts on one side or the other: how far PyTorch's own gradient goes when
        # its parameters move by as much as our convolutions round.
        noise = relative(single, precise)
        for seed in range(4):
            random, moved = torch.Generator().manual_seed(seed), make(torch.contiguous_format)
            moved.parameters = [(p * (1 + ROUNDING * torch.randn(p.shape, generator=random))).detach().requires_grad_(True)
                                for p in moved.parameters]
            noise = max(noise, relative(flat(moved.gradient()[1]), precise))
        same = [agree("loss", relative(loss.detach(), values["loss"][0]), LOSS_TOLERANCE),
                agree("gradient in f64", relative(written("precise"), precise), PRECISE_TOLERANCE),
                agree("f32 from f64", relative(written("gradient"), precise), max(2 * noise, LOSS_TOLERANCE)),
                f"PyTorch's moved {noise:.0e}"]
        ways = {key: make(layout).gradient for key, layout in LAYOUTS.items()}
        return case, with_compiled(ways, make, arguments.compile), ", ".join(same)

    return build


def python_ways(path, parts, threads):
    """ONNX Runtime from Python on ready tensors, a way each: one session of all threads or a session of one thread for
    each, with the options Python's users have and with ours (no memory pattern, no spinning)."""

    def session(intra, plain):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra
        if not plain:
            options.enable_mem_pattern = False
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def ask(one, part):
        return one.run(None, {one.get_inputs()[0].name: part})[0]

    pool, ways = ThreadPoolExecutor(threads), {}
    for plain, words in ((True, ""), (False, ", our options")):
        shared, own = session(threads, plain), [session(1, plain) for _ in range(threads)]

        def share(at, own=own):
            return [ask(own[at], part) for part in parts[at::threads]]

        ways["one session" + words] = lambda shared=shared: [ask(shared, part) for part in parts]
        ways["a session a thread" + words] = lambda share=share: list(pool.map(share, range(threads)))
    return ways


def black_box(name, batch, runs):
    """`runs` batches, each way of `python_ways`."""

    def build(ours, _):
        path, _graph = prepare(ours.folder, name, batch)
        case = ["black-box", path, batch, runs]
        values = ours.values(*case)
        parts = [part.numpy() for part in values["images"].split(batch)]
        ways = python_ways(path, parts, torch.get_num_threads())
        given = torch.from_numpy(np.concatenate(ways["one session"]()))
        return case, ways, agree("scores", relative(given, values["logits"]), LOSS_TOLERANCE)

    return build


class Row:
    """What is measured: a title, the most (for `queries` the least) that ours / PyTorch's may be, how it is built."""

    def __init__(self, title, target, build, threads=None, queries=None):
        self.title, self.target, self.build = title, target, build
        self.threads, self.queries = threads, queries


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


def memory_of_pytorch(path, batch, way):
    """In a process of its own: MiB before the first step and at the peak of three."""
    module = load_weights(ResNet18(), onnx.load(path).graph)
    step = Inversion(module, torch.rand(batch, 3, 32, 32), LAYOUTS.get(way, torch.channels_last))
    step.layout = torch.channels_last  # the variance that keeps less
    run = step.compiled() if way == "compiled" else step.gradient
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    base = resident("VmRSS:")
    for _ in range(3):
        run()
    print(f"{base:.1f}\n{resident('VmHWM:'):.1f}")


def measure_memory(ours, arguments, batch=64):
    path, _ = prepare(ours.folder, "resnet18", batch)
    found, notes = {}, []
    for way in ["ours", *LAYOUTS, *(["compiled"] if arguments.compile else [])]:
        if way == "ours":
            base, peak = ours.run("memory", path, batch)
        else:
            command = [sys.executable, __file__, "--memory-child", str(path), str(batch), way,
                       "--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                notes.append(f"{way} failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:160]}")
                continue
            base, peak = map(float, done.stdout.split())
        found[way] = peak - base
        notes.append(f"{way} {base:.0f} to {peak:.0f} MiB")
    return found, "; ".join(notes)


ROWS = {
    "conv4-1-thread": Row("inversion step, Conv4-64 32x32 batch 128, 1 thread", 0.25, inversion("conv4", 128), threads=1),
    "conv4": Row("inversion step, Conv4-64 32x32 batch 128", 0.25, inversion("conv4", 128)),
    "resnet18": Row("inversion step, ResNet-18 (CIFAR stem) 32x32 batch 64", 0.60, inversion("resnet18", 64)),
    "resnet50": Row("inversion step, ResNet-50 224x224 batch 4", 1.0, inversion("resnet50", 4)),
    "mobilenet_v2": Row("inversion step, MobileNetV2 224x224 batch 8", 1.0, inversion("mobilenet_v2", 8)),
    "densenet121": Row("inversion step, DenseNet121 224x224 batch 4", 1.0, inversion("densenet121", 4)),
    "vit_tiny": Row("inversion step, ViT-tiny 224x224 batch 8", 1.0, inversion("vit_tiny", 8)),
    "convnext_tiny": Row("inversion step, ConvNeXt-T 224x224 batch 2", 1.0, inversion("convnext_tiny", 2)),
    "generator": Row("generator (methods.md 1.3) + Conv4-64 step, batch 100", 0.6, generator(100)),
    "maml-1-shot": Row("second-order MAML task, Conv4-32, 5-way 1-shot, 32x32", 0.5, episode(Maml, 5, 1, 32)),
    "maml-5-shot": Row("second-order MAML task, Conv4-32, 5-way 5-shot, 32x32", 0.5, episode(Maml, 5, 5, 32)),
    "protonet": Row("ProtoNet episode, Conv4-32, 5-way 5-shot, 32x32", 0.6, episode(ProtoNet, 5, 5, 32)),
    "black-box-conv4": Row("black box, Conv4-64, queries/s at batch 128", 1.0, black_box("conv4", 128, 8), queries=128 * 8),
    "black-box-resnet18": Row("black box, ResNet-18, queries/s at batch 128", 1.0, black_box("resnet18", 128, 2),
                              queries=128 * 2),
    "memory": Row("peak memory of the ResNet-18 step, batch 64", 1.0, None),
}
LARGE = {
    "maml-1-shot-84": Row("second-order MAML task, Conv4-32, 5-way 1-shot, 84x84", 0.5, episode(Maml, 5, 1, 84)),
    "maml-5-shot-84": Row("second-order MAML task, Conv4-32, 5-way 5-shot, 84x84", 0.5, episode(Maml, 5, 5, 84)),
    "protonet-84": Row("ProtoNet episode, Conv4-32, 5-way 5-shot, 84x84", 0.6, episode(ProtoNet, 5, 5, 84)),
}


# Measuring.


def timed(step):
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def too_long(_signal, _frame):
    raise TimeoutError("not compiled in time (--compile-limit)")


def warm(ways, limit):
    """Runs each way twice; torch.compile is taken out where it fails or takes more than `limit` seconds. Notes of that."""
    notes = []
    signal.signal(signal.SIGALRM, too_long)
    for way in list(ways):
        try:
            signal.alarm(limit if way == "compiled" else 0)
            ways[way](), ways[way]()
        except Exception as error:
            if way != "compiled":
                raise
            del ways[way]
            reason = " ".join(str(error).split()).split(" Set TORCHDYNAMO")[0][:160]
            notes.append(f"torch.compile failed: {type(error).__name__}: {reason}")
        finally:
            signal.alarm(0)
    return notes


def measure_times(row, ours, arguments):
    """Medians in ms by way, what was checked, and what failed."""
    case, ways, same = row.build(ours, arguments)
    notes = warm(ways, arguments.compile_limit)
    times = {way: [] for way in ["ours", *ways]}
    for _ in range(arguments.rounds):
        times["ours"] += ours.run("--steps", arguments.steps, *case)
        for way, step in ways.items():
            times[way] += [timed(step) for _ in range(arguments.steps)]
    return {way: statistics.median(all_) for way, all_ in times.items()}, same, notes


def line(name, row, arguments, threads):
    """The row's line in the table: name, title, ours, PyTorch's, others, ratio, target, met, same, when."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(folder, threads)
        if row.build is None:
            found, note = measure_memory(ours, arguments)
            same, notes, unit = "", [note], "MiB"
        else:
            found, same, notes = measure_times(row, ours, arguments)
            unit = "ms"
    own = found.pop("ours")
    if not found:
        raise Failed("; ".join(notes))
    best = min(found, key=found.get)
    ratio, met = own / found[best], own <= row.target * found[best]
    if row.queries:
        rates = {way: 1e3 * row.queries / value for way, value in found.items()}
        own, found, unit = 1e3 * row.queries / own, rates, "queries/s"
        ratio = own / found[best]
        met = ratio >= row.target
    sign = ">=" if row.queries else "<="
    others = ", ".join(f"{way} {value:.4g}" for way, value in found.items() if way != best)
    kind = f"{threads} thread" + ("s" if threads > 1 else "")
    cells = [f"`{name}`", f"{row.title} ({kind})" if row.threads is None else row.title, f"{own:.4g} {unit}",
             f"{found[best]:.4g} {unit} ({best})", others, f"{ratio:.2f}", f"{sign} {row.target:g}",
             "yes" if met else "no", "; ".join([same, *notes]).strip("; "), f"{datetime.date.today()} {commit()}"]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit():
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", "src", "examples", "Cargo.toml")
    return output_of("git", "rev-parse", "--short", "HEAD") + ("+" if changed else "")


def machine():
    fields = dict(item.split(":", 1) for item in output_of("lscpu").splitlines() if ":" in item)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    memory = output_of("grep", "MemTotal", "/proc/meminfo").split()
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in fields.get("Flags", "").split()]
    gib = f"{int(memory[1]) / 2**20:.0f} GiB" if len(memory) > 1 else "?"
    return (f"{fields.get('Model name', platform.processor())} (family {fields.get('CPU family')}, model "
            f"{fields.get('Model')}), {os.cpu_count()} cores, {gib}, {' '.join(wide)}; {platform.system()}; "
            f"load before the last run {os.getloadavg()[0]:.1f}")


def versions():
    return (f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__} (both sides), "
            f"{output_of('rustc', '--version')}, Python {platform.python_version()}")


HEAD = """\
# Speed against PyTorch

`benches/reference/speed.py --write` writes this table; its head says what is measured, what is checked and what is not. Medians
of interleaved rounds; PyTorch's is the best of the ways tried, the others stand beside it. Ratio: ours / PyTorch's. "Same":
relative distance of the two sides' results before they were timed. A `+` after the commit: with changes that were not yet committed.

* Machine of the last run: {machine}
* Versions of the last run: {versions}, {rounds} rounds of {steps} steps

| row | work | ours | PyTorch, best | other ways | ratio | target | met | same, notes | date, commit |
|---|---|---|---|---|---|---|---|---|---|
"""


def write(lines, arguments, before):
    """Puts the new lines into the table; those of rows not run now stay, and so do sections after it."""
    kept, rest = {}, ""
    if RESULTS.exists():
        table, mark, rest = RESULTS.read_text().partition("\n## ")
        rest = mark + rest
        kept = {text.split("`")[1]: text for text in table.splitlines() if text.startswith("| `")}
    kept.update(lines)
    order = [*ROWS, *LARGE]
    table = "".join(kept[name] + "\n" for name in order if name in kept)
    head = HEAD.format(machine=before, versions=versions(), rounds=arguments.rounds, steps=arguments.steps)
    RESULTS.write_text(head + table + rest)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps a round of each side")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--compile-limit", type=int, default=300, help="seconds for torch.compile of a row")
    parser.add_argument("--large", action="store_true", help="episodes at 84x84 too")
    parser.add_argument("--write", action="store_true", help="write benches/RESULTS.md")
    parser.add_argument("--memory-child", nargs=3, metavar=("FILE", "BATCH", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_child:
        path, batch, way = arguments.memory_child
        return memory_of_pytorch(path, int(batch), way)
    if arguments.quick:
        arguments.rounds = arguments.steps = 2
    known = {**ROWS, **LARGE}
    if arguments.list:
        return print("\n".join(f"{name}: {row.title}" for name, row in known.items()))
    unknown = [name for name in arguments.rows if name not in known]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; --list names them")
    if os.getloadavg()[0] > 0.5:
        # Threads of PyTorch that wait for a core that others have made steps ten times slower here.
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f}): PyTorch suffers most", file=sys.stderr)
    before, lines, failed = machine(), {}, []
    for name in arguments.rows or [*ROWS, *(LARGE if arguments.large else [])]:
        row = known[name]
        threads = row.threads or arguments.threads
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        try:
            lines[name] = line(name, row, arguments, threads)
            print(lines[name], flush=True)
        except Failed as error:
            failed.append(name)
            print(f"{name}: not measured: {error}", flush=True)
        # A row can take minutes: what is measured is written at once.
        if arguments.write and lines:
            write(lines, arguments, before)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
