"""Good artifacts, how deep a loader gets into a corrupted one, and what must hold of what it does."""

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
from fuzzing.corrupt import REFUSED, SAME
from fuzzing.sandbox import Sandbox, TooLongError

SECONDS, MEMORY = 10, 2**29  # of one case; a good one takes a tenth of a second and hardly any memory
LONGEST_MESSAGE = 5000  # characters
DEPTHS = ("JSON", "schema", "hashes", "header", "shapes", "weights", "outputs")  # what a loader checks, in order
# A call, the depth that is reached when it begins, and the one when it returns. If the loader no longer makes one of
# these calls, no case gets there, and the run fails.
_PROBES: tuple[tuple[Any, str, str, str], ...] = (
    (artifact.Manifest, "model_validate", "schema", "hashes"),
    (safetensors, "safe_open", "header", "header"),
    (rewriter, "build", "shapes", "shapes"),
    (nn.Module, "load_state_dict", "weights", "weights"),
)


class Own(nn.Module):
    """A network with sites of every kind, and weights with two names."""

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


# By name: what builds the model (test_resnet is timm's smallest), and the options of its conversion.
GOOD: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "artifact": (lambda: timm.create_model("test_resnet", num_classes=2), {}),
    "own": (Own, {"upsample": True, "allow_growth": True}),
    "experts": (Own, {"filter": "condconv", "filter_options": {"num_experts": 2}}),
}


def image() -> Tensor:
    return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def prepare(folder: Path) -> None:
    """Writes the good artifacts, with all the files that one can have, and the outputs of their models."""
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


class DepthProbe:
    """Notes how deep a case gets."""

    def __init__(self) -> None:
        self.deepest = DEPTHS[0]

    def note(self, depth: str) -> None:
        self.deepest = max(self.deepest, depth, key=DEPTHS.index)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, *depths in _PROBES:
                stack.enter_context(mock.patch.object(owner, name, self._probe(getattr(owner, name), *depths)))
            yield

    def _probe(self, call: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def probe(*args: Any, **kwargs: Any) -> Any:
            self.note(before)
            result = call(*args, **kwargs)
            self.note(after)
            return result

        return probe


def judge(good: Path, folder: Path, loader: str, expected: str, sandbox: Sandbox) -> tuple[str, str, list[str]]:
    """Loads a corrupted artifact.

    Args:
        good: The folder of :func:`prepare`.
        folder: The corrupted copy of its artifact of the same name.
        loader: "load", "restore" or "original".
        expected: REFUSED, SAME or EITHER.
        sandbox: Watches.

    Returns:
        The last of ``DEPTHS`` that it came to, what came of it ("refused", "loaded", "cannot run"), and all problems.
    """
    torch.manual_seed(1)
    model = GOOD[folder.name][0]()
    before, files, state = snapshot(model), contents(folder), torch.get_rng_state()
    probe, error, output = DepthProbe(), None, None
    with sandbox.watching(folder.parent, SECONDS, MEMORY) as problems:
        try:
            with probe.watching():
                loaded = _load(loader, folder, model)
        except TooLongError:
            return probe.deepest, "endless", [f"no end after {SECONDS} s"]
        except Exception as raised:
            error = raised
        else:
            output = _output(loaded, problems)
    if error is not None:
        problems += errors_in(error)
        if loader != "load" and snapshot(model) != before:
            problems.append("refused, and the model changed")
    if contents(folder) != files:
        problems.append("the folder changed")
    if not torch.equal(torch.get_rng_state(), state):
        problems.append("the random state changed")
    outcome = "refused" if error is not None else "loaded" if output is not None else "cannot run"
    if outcome == "loaded":
        probe.note("outputs")
    if expected == REFUSED and error is None:
        problems.append(f"accepted; it {outcome}")
    if expected == SAME:
        right = torch.load(good / f"{folder.name}.pt")["original" if loader == "original" else "converted"]
        if output is None or not torch.equal(output, right):
            problems.append(f"another network came back: {error or outcome}")
    return probe.deepest, outcome, problems


def _load(loader: str, folder: Path, model: nn.Module) -> nn.Module:
    if loader == "load":
        return ddf.load(folder)
    if loader == "restore":
        return ddf.restore(model, folder)
    return artifact.load_original(folder, model)


def _output(model: nn.Module, problems: list[str]) -> Tensor | None:
    """Runs a loaded model; a valid manifest may describe a network that cannot run, which is no problem."""
    try:
        with torch.random.fork_rng():
            return run(model)
    except TooLongError:
        problems.append("loaded, and no end of its forward")
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            problems.append(f"loaded, and its forward asks for too much: {error!r:.200}")
    return None


def errors_in(error: Exception) -> list[str]:
    """Returns the problems of an error as such: its type, and its message."""
    text = str(error)
    if not isinstance(error, ddf.UsageError):
        return [f"{type(error).__name__}: {text:.300}"]
    problems = []
    if not text.isprintable():
        problems.append(f"more than one line, or not printable: {text!r:.300}")
    if len(text) > LONGEST_MESSAGE:
        problems.append(f"{len(text)} characters: {text[:200]!r}")
    if "allocate memory" in text:
        problems.append(f"asked for too much memory: {text:.300}")
    return problems


def contents(folder: Path) -> dict[str, str]:
    """Returns hashes of files by name. A pending file (``.new``) counts as the file that it becomes."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
    pending = {name.removesuffix(".new"): digest for name, digest in files.items() if name.endswith(".new")}
    return {name: digest for name, digest in files.items() if not name.endswith(".new")} | pending


def snapshot(model: nn.Module) -> list[Any]:
    """Returns what a failed ``restore`` must not change: objects, attributes, and the bits of tensors."""
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
