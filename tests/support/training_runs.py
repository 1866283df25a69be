"""Small networks, images and recipes to train with, and runs in this process and in others."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from PIL import Image

from ddf_convert import cli, recipes
from ddf_convert.artifacts import artifact
from ddf_convert.commands import console
from ddf_convert.training import api, logs
from ddf_convert.training.setup import FinetuneRequest
from ddf_convert.training.trainer import TrainingOptions

SIZE = (3, 16, 16)
CLASSES = 3
TRAINING, VALIDATION = 16, 5  # images of a class
# Reads of a data set without files that the first process takes before it trains: to try it, and to know it again.
OPENING = {"train": 1 + 2 * 16, "val": 1 + 2 * CLASSES * VALIDATION}

# What users have in a file of their own: models, and data that can send a signal when the n-th image is read.
MODULE = '''
import os
import signal
from pathlib import Path

import torch
from PIL import Image
from torch import nn


class Net(nn.Module):
    def __init__(self, norm, drop=0.2):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16) if norm else nn.GroupNorm(2, 16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 24, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(24, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.last(self.body(x).relu()).relu()
        return self.fc(self.drop(x.mean((2, 3))))


def plain():
    torch.manual_seed(0)
    return Net(False)


def normed():
    torch.manual_seed(0)
    return Net(True)


def calm():
    torch.manual_seed(0)
    return Net(False, drop=0.0)


class Bad(nn.Module):
    """In the third batch of training, goes wrong."""

    def __init__(self, how):
        super().__init__()
        self.how, self.batches = how, 0

    def forward(self, x):
        self.batches += self.training
        return self.how(x) if self.training and self.batches >= 3 else x


class Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def bad(how):
    model = plain()
    model.drop = Bad(how)
    return model


def no_number():
    return bad(lambda x: x / 0)


def no_gradient():
    return bad(Gradient.apply)


def no_memory():
    def fails(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return bad(fails)


def no_cpu_memory():
    def fails(x):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    return bad(fails)


class Photos(torch.utils.data.Dataset):
    classes = ["c0", "c1", "c2"]

    def __init__(self, split):
        self.files = sorted(Path("data", "val" if split == "validation" else split).glob("*/*.png"))
        self.reads = 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        number, _, rank = os.environ.get("SIGNAL_AT", "0:0").partition(":")
        self.reads += 1
        if self.reads == int(number) and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        if os.environ.get("BREAK_AT") == f"{self.reads}:{os.environ.get('RANK', '0')}":
            raise OSError("the disk is gone")
        file = self.files[index]
        return Image.open(file), int(file.parent.name[1:])


def photos(split):
    return Photos(split)


class Strange(Photos):
    classes = None

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, label + 7


def strange(split):
    return Strange(split)
'''

# Two stages: of the original's features, then of the labels, with everything that is random or has a state.
RECIPE = """
name: test
conversion: {affine: true, mixing: always}
initialize: {method: preserve}
stages:
  - name: features
    trainable: new
    epochs: 1
    batch_size: 8
    optimizer: {opt: sgd, lr: 0.05}
    losses: {task: 0, features: 1.0}
  - name: labels
    epochs: 2
    batch_size: 4
    accumulate: 2
    optimizer: {opt: adamw, lr: 0.01, weight_decay: 0.05, old_lr_scale: 0.5}
    schedule: {sched: cosine, warmup_epochs: 0.5}
    losses: {task: 1.0, logits: 0.5, label_smoothing: 0.1}
    augmentation: {scale: [0.5, 1.0], color_jitter: 0.2, re_prob: 0.2, mixup: 0.2, cutmix: 0.5}
    clip: {value: 1.0}
    ema_decay: 0.9
"""
STEPS = 6 + 12


def prepare(folder: Path) -> Path:
    """A folder with the module, images, the recipe, and both networks converted; it becomes the current one."""
    (folder / "tinyruns.py").write_text(MODULE)
    (folder / "test.yaml").write_text(RECIPE)
    random = numpy.random.RandomState(0)
    for split, count in (("train", TRAINING), ("val", VALIDATION)):
        for label in range(CLASSES):
            place = folder / "data" / split / f"c{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 150, (*SIZE[1:], 3))
                pixels[..., label] += 105
                Image.fromarray(pixels.astype("uint8")).save(place / f"{number:02}.png")
    enter(folder)
    module = importlib.import_module("tinyruns")
    recipe = recipes.load("test.yaml")
    for name in ("plain", "normed"):
        original = getattr(module, name)()
        model = recipe.convert(original, torch.zeros(1, *SIZE))
        recipe.initialize(model, original)
        artifact.save(model, folder / name, original=original)
    return folder


def enter(folder: Path) -> None:
    """Makes a prepared folder the current one, for imports too; sums have one order, whatever the machine."""
    os.chdir(folder)
    sys.modules.pop("tinyruns", None)
    sys.path[:] = [str(folder), *(each for each in sys.path if not Path(each, "tinyruns.py").exists())]
    torch.set_num_threads(1)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process draw no curves and write no events, which takes longer than to train such networks."""
    monkeypatch.setattr(logs, "draw", lambda rows: b"\x89PNG")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def request(
    output: str, model: str = "plain", data: str = "data", recipe: str = "test.yaml", **more: Any
) -> FinetuneRequest:
    """What ``finetune`` is asked, in a prepared folder."""
    own = more.pop("own", model)
    options = {name: more.pop(name) for name in list(more) if name in TrainingOptions.__dataclass_fields__}
    return FinetuneRequest(
        Path(model),
        data,
        Path(output),
        recipe=recipe,
        model=f"tinyruns:{own}",
        input_size=SIZE,
        device="cpu",
        options=TrainingOptions(**options),
        **more,
    )


def finetune(output: str, **more: Any) -> api.FinetuneOutcome:
    """A run in this process."""
    outcome = api.finetune(request(output, **more))
    assert outcome is not None
    return outcome


def command(output: str, *more: str, model: str = "plain", data: str = "data", recipe: str = "test.yaml") -> list[str]:
    """The arguments of the same on a command line."""
    size = ["--input-size", *map(str, SIZE)]
    own = ["--model", f"tinyruns:{model}", "--device", "cpu", "--workers", "0"]
    return ["finetune", model, "--data", data, "--recipe", recipe, "-o", output, *own, *size, *more]


@dataclass
class Done:
    """What became of a command: how its processes ended, and what all of them said."""

    codes: list[int | None]
    stdout: str
    stderr: str


def start(*arguments: str, processes: int = 1, **environment: str) -> Done:
    """A command in a process of its own, or in several that know each other as if torchrun had started them.

    They are forked from one that has imported everything, which is most of what starting a command takes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddf_convert.training.api"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started, files = [], [Path(f"said-{port}-{stream}") for stream in ("out", "err")]
    for rank in range(processes):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        settings = {**(group | address if processes > 1 else {}), **environment}
        started.append(context.Process(target=_command, args=(arguments, settings, *files)))
        started[-1].start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return Done([process.exitcode for process in started], *(file.read_text() for file in files))


def _command(arguments: tuple[str, ...], settings: dict[str, str], *files: Path) -> None:
    """In the new process: the command line, with its output in files."""
    os.environ.update(settings)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    console.err.file = sys.stderr
    code = cli.run(list(arguments))
    sys.stdout.flush()
    sys.exit(code)


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as torchrun starts it, twice."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, "-m", "ddf_convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Of a converted folder."""
    return safetensors.torch.load_file(Path(folder, "model.safetensors"))


def distance(
    one: dict[str, torch.Tensor],
    other: dict[str, torch.Tensor],
    skip: tuple[str, ...] = ("running_mean", "running_var", "tracked"),
) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one if not name.endswith(skip))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
