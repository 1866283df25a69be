"""Artifacts that are good, how deep a loader gets into one that is spoiled, and what must hold of what it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert.artifacts import artifact
from ddf_convert.conversion import rewriter
from fuzz_parts.guard import Guard, TooLong
from fuzz_parts.spoil import REFUSED, SAME

SECONDS, MEMORY = 10, 2**29  # of one case; a good one takes a tenth of a second and no memory to speak of
MESSAGE = 5000  # characters
# What a loader checks, in order. A case has got as far as the last one that it came to.
DEPTHS = ("JSON", "schema", "hashes", "header", "shapes", "weights", "outputs")
# A call, the depth that is reached when it begins, and the one that is reached when it returns. If the loader no longer
# makes one of these calls, no case gets there, and the run fails.
_PROBES: tuple[tuple[Any, str, str, str], ...] = (
    (artifact.Manifest, "model_validate", "schema", "hashes"),
    (safetensors, "safe_open", "header", "header"),
    (rewriter, "build", "shapes", "shapes"),
    (nn.Module, "load_state_dict", "weights", "weights"),
)


class Own(nn.Module):
    """Sites of every kind, and weights with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.up, self.transposed = nn.Upsample(scale_factor=2), nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.transposed(self.up(self.b(self.a(self.stem(x))))))
        x = F.interpolate(x, scale_factor=2)
        return self.left(x) + self.right(x)


def _timm() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=2)  # timm's smallest


# By name: what builds the model, and the options of its conversion.
GOOD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "artifact": (_timm, {}),
    "own": (Own, {"upsample": True, "allow_growth": True}),
    "experts": (Own, {"filter": "condconv", "filter_options": {"num_experts": 2}}),
}


def image() -> Tensor:
    return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def prepare(folder: Path) -> None:
    """Writes the good artifacts, with all the files that one can have, and what their models make of an image."""
    torch.manual_seed(0)
    for name, (build, options) in GOOD.items():
        original = build()
        model = ddf.convert(original, example_input=image(), **options)
        ddf.save(model, folder / name, report={"model": name}, original=original)
        outputs = {"converted": run(model), "original": run(original)}
        torch.save(outputs, folder / f"{name}.pt")


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model.eval()(image())


class Reach:
    """How deep a case gets."""

    def __init__(self) -> None:
        self.deepest = DEPTHS[0]

    def reached(self, depth: str) -> None:
        self.deepest = max(self.deepest, depth, key=DEPTHS.index)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, *depths in _PROBES:
                stack.enter_context(mock.patch.object(owner, name, self._probe(getattr(owner, name), *depths)))
            yield

    def _probe(self, call: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def probe(*args: Any, **kwargs: Any) -> Any:
            self.reached(before)
            result = call(*args, **kwargs)
            self.reached(after)
            return result

        return probe


def judge(good: Path, folder: Path, way: str, expected: str, guard: Guard) -> tuple[str, str, list[str]]:
    """Loads a spoiled artifact.

    Args:
        good: The folder of :func:`prepare`; its artifact of the same name was spoiled.
        folder: The spoiled one.
        way: "load", "restore" or "original".
        expected: What must become of it.
        guard: Watches.

    Returns:
        How deep it got, what became of it, and everything that is wrong with that.
    """
    torch.manual_seed(1)
    model = GOOD[folder.name][0]()
    before, files, state = snapshot(model), contents(folder), torch.get_rng_state()
    reach, error, output, loaded = Reach(), None, None, None
    with guard.watching(folder.parent, SECONDS, MEMORY) as wrong:
        try:
            with reach.watching():
                loaded = _load(way, folder, model)
        except TooLong:
            return reach.deepest, "endless", [f"no end after {SECONDS} s"]
        except Exception as raised:
            error = raised
        if error is None:
            output = _output(loaded, wrong)
    if error is not None:
        wrong += errors_in(error)
        if way != "load" and snapshot(model) != before:
            wrong.append("refused, and the model changed")
    if contents(folder) != files:
        wrong.append("the folder changed")
    if not torch.equal(torch.get_rng_state(), state):
        wrong.append("the random state changed")
    became = "refused" if error is not None else "loaded" if output is not None else "cannot run"
    if became == "loaded":
        reach.reached("outputs")
    if expected == REFUSED and error is None:
        wrong.append(f"accepted; it {became}")
    if expected == SAME:
        right = torch.load(good / f"{folder.name}.pt")["original" if way == "original" else "converted"]
        if output is None or not torch.equal(output, right):
            wrong.append(f"another network came back: {error or became}")
    return reach.deepest, became, wrong


def _load(way: str, folder: Path, model: nn.Module) -> nn.Module:
    if way == "load":
        return ddf.load(folder)
    if way == "restore":
        return ddf.restore(model, folder)
    return artifact.load_original(folder, model)


def _output(model: nn.Module, wrong: list[str]) -> Tensor | None:
    """What a loaded model makes of an image; a manifest may describe, in all honesty, a network that cannot run."""
    try:
        with torch.random.fork_rng():
            return run(model)
    except TooLong:
        wrong.append("loaded, and no end of its forward")
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            wrong.append(f"loaded, and its forward asks for too much: {error!r:.200}")
    return None


def errors_in(error: Exception) -> list[str]:
    """What is wrong with an error as such."""
    text = str(error)
    if not isinstance(error, ddf.UsageError):
        return [f"{type(error).__name__}: {text:.300}"]
    wrong = []
    if not text.isprintable():
        wrong.append(f"more than one line, or not printable: {text!r:.300}")
    if len(text) > MESSAGE:
        wrong.append(f"{len(text)} characters: {text[:200]!r}")
    if "allocate memory" in text:
        wrong.append(f"asked for too much memory: {text:.300}")
    return wrong


def contents(folder: Path) -> dict[str, str]:
    """Hashes by name; a pending file may get its name, and nothing else may happen."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    pending = {name.removesuffix(".new"): digest for name, digest in files.items() if name.endswith(".new")}
    return {name: digest for name, digest in files.items() if not name.endswith(".new")} | pending


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that a failed ``restore`` must leave as it was: objects, attributes, and the bits of tensors."""
    modules = [
        (name, id(module), type(module), {key: _plain(value) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, id(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad, _bits(tensor))
        for name, tensor in model.state_dict(keep_vars=True).items()
    ]
    return [modules, tensors]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value)
    return value if isinstance(value, str | int | float | tuple | None) else id(value)


def _bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
