"""Loads checkpoints of other programs without running any code in them."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ddf_convert.artifacts.path_checks import check_readable
from ddf_convert.artifacts.state import describe_difference, list_names, printable, state_shapes
from ddf_convert.errors import UsageError
from ddf_convert.utils.logging import warn

# Names that wrappers insert: DataParallel and DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SWA_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
_BATCH_NORM_COUNTER = "num_batches_tracked"  # missing in checkpoints from before PyTorch 0.4.1
_AVERAGED = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"optim|grad|momentum|exp_avg")  # tensors under the weights' names that are not weights
# Where several mappings fit: timm's order; averaged weights of other libraries before those that are not averaged.
_TIMM_AVERAGED = ("state_dict_ema", "model_ema")
_TIMM_PLAIN = ("state_dict", "model")

# Types that hold settings and metrics. Unpickling replaces their objects by stand-ins that do nothing.
_HARMLESS_TYPES = re.compile(
    r"(?:numpy|pathlib|datetime|omegaconf|yacs|typing)\.|"
    r"(?:argparse\.Namespace|types\.SimpleNamespace|collections\.(?:deque|defaultdict)|decimal\.Decimal|uuid\.UUID|"
    r"builtins\.(?:complex|slice|set|frozenset|range|bytearray|dict|list|tuple|int|float|str|bool))$"
)
_MAX_TYPES = 64  # stand-ins in one file
_MAX_PREFIXES = 16  # that are tried
_MAX_DEPTH = 6  # of nested mappings
_MAX_ALTERNATIVES = 3  # in a warning
_HEAD_BYTES = 4096  # that say what kind a file is
_ZIP = b"PK\x03\x04"
_SHARD_NAME = re.compile(r"-0*\d+-of-0*(?!1\D)\d+\.")

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself; run git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file; only files of torch.save and safetensors are read"),
    (b"\x93NUMPY", "a NumPy array; only files of torch.save and safetensors are read"),
    (b"GGUF", "a GGUF file; only files of torch.save and safetensors are read"),
)


def load_checkpoint(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Loads a checkpoint into a model, in place: all weights or, if any does not fit, none.

    The weights may be stored under any key ("state_dict", "model_state_dict", "net", "params", ...) beside other
    content, such as an optimizer's state, and their names may share a prefix ("module.", "_orig_mod.", "model.", ...).
    The mapping that fits the model in all names and shapes is loaded, and a warning says which one. If several fit,
    averaged weights (EMA) come first, then "state_dict" and "model", as in timm.

    Args:
        model: The model that the weights belong to: the unconverted one, for weights from before conversion.
        file: A file of safetensors or ``torch.save``, with nothing but tensors and plain values.

    Raises:
        UsageError: There is no such file, it is not a checkpoint, it holds code (which is never run), its names,
            shapes or dtypes are not the model's, or several different mappings fit equally well.
    """
    path = os.fspath(file)
    content = _read(path)
    expected = state_shapes(model)
    candidates = [each for each in _candidates(content) if not _OPTIMIZER.search(".".join(each.path))]
    if not candidates:
        raise UsageError(f"{path} is not a checkpoint of weights: {_describe_content(content)}")
    chosen, others = _choose(path, model, candidates, expected)
    own = model.state_dict()
    model.load_state_dict({name: chosen.tensors.get(name, own[name]) for name in expected})
    if description := _describe_choice(chosen, others, content):
        warn(f"{path}: {description}")


def why_unreadable(error: BaseException) -> str:
    """Returns why torch cannot read a file, in one line, without its advice to read it unsafely; may be empty."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    unsafe = _unsafe_global(text)
    if unsafe:
        return f"it holds code ({unsafe}), which is never run"
    if "Unsupported operand" in text:
        return "a pickle that is not of protocol 2, torch.save's own"
    _, sign, inner = text.partition("WeightsUnpickler error: ")
    lines = (inner if sign else text).strip().splitlines()
    line = re.split(r"\.\s|\. ?$", lines[0])[0].strip() if lines else ""
    return "" if "weights_only" in line else line


# --- the mapping in a checkpoint that fits a model ---


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A mapping in a checkpoint that holds tensors, or the part of one under a prefix."""

    path: tuple[str, ...]  # keys that lead to it
    tensors: dict[str, Tensor]
    prefix: str = ""  # removed from the names
    rest: tuple[str, ...] = ()  # names in the mapping that are left out

    def __str__(self) -> str:
        where = repr(".".join(self.path)) if self.path else ""
        prefix = f"prefix {self.prefix!r}" if self.prefix else ""
        return " with ".join(filter(None, (where, prefix))) or "the file's own names"

    @property
    def rank(self) -> int:
        """Returns the preference where several fit: the lowest is taken."""
        key = self.path[0] if len(self.path) == 1 else None
        if key in _TIMM_AVERAGED:
            return _TIMM_AVERAGED.index(key)
        if _AVERAGED.search(".".join((*self.path, self.prefix))):
            return 2
        return 3 + _TIMM_PLAIN.index(key) if key in _TIMM_PLAIN else 5


def _candidates(content: Any) -> list[_Candidate]:
    """Returns the mappings in a checkpoint that hold named tensors, each once: a hostile file can contain itself."""
    candidates: list[_Candidate] = []
    seen: set[int] = set()

    def visit(value: Any, path: tuple[str, ...]) -> None:
        if id(value) in seen or len(path) > _MAX_DEPTH:
            return
        if isinstance(value, Mapping):
            seen.add(id(value))
            tensors = {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, Tensor)}
            if tensors:
                rest = tuple(str(name) for name in value if name not in tensors)
                candidates.append(_Candidate(path, tensors, rest=rest))
            for name, each in value.items():
                visit(each, (*path, str(name)))
        elif isinstance(value, list | tuple):
            seen.add(id(value))
            for index, each in enumerate(value):
                visit(each, (*path, str(index)))

    visit(content, ())
    return candidates


def _choose(
    path: str, model: nn.Module, candidates: list[_Candidate], expected: Mapping[str, tuple[int, ...]]
) -> tuple[_Candidate, list[_Candidate]]:
    """Returns the candidate to load, and the others that would fit; raises UsageError if none or several do."""
    parts = [part for candidate in candidates for part in _strip_prefixes(candidate, expected)]
    fitting = sorted((part for part in parts if not _difference(part, expected)), key=lambda part: part.rank)
    if not fitting:
        nearest = max(parts, key=lambda part: (_agreement(part, expected), -part.rank))
        where = f" ({nearest})" if nearest.path or nearest.prefix else ""
        raise UsageError(
            f"{path}{where} does not fit {type(model).__name__}: {_difference(nearest, expected)}{_shard_hint(path)}"
        )
    best = [part for part in fitting if part.rank == fitting[0].rank]
    if any(not _is_equal(best[0], part) for part in best[1:]):
        raise UsageError(
            f"{path} holds several mappings that fit {type(model).__name__}: {' and '.join(map(str, best))}; save the"
            " one that is meant by itself"
        )
    if problem := _unloadable_tensor(best[0], model):
        raise UsageError(f"{path} does not fit {type(model).__name__}: {problem}")
    return best[0], [part for part in fitting if all(part is not each for each in best)]


def _strip_prefixes(candidate: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> Iterator[_Candidate]:
    """Yields the parts of a mapping whose names, without a prefix, are the model's; the fullest one first."""
    wanted = _without_wrappers(expected)
    tensors = _without_wrappers(candidate.tensors)
    prefixes: Counter[str] = Counter()
    for name in tensors:
        words = name.split(".")
        starts = (start for start in range(len(words)) if ".".join(words[start:]) in wanted)
        prefixes.update(".".join((*words[:start], "")) for start in starts)
    for prefix, _ in prefixes.most_common(_MAX_PREFIXES) or [("", 0)]:
        part = {name.removeprefix(prefix): full for name, full in tensors.items() if name.startswith(prefix)}
        yield _Candidate(
            candidate.path,
            {
                wanted.get(name, full): candidate.tensors[full]
                for name, full in part.items()
                if name in wanted or name != _SWA_COUNTER
            },
            _removed_prefix(part),
            (*candidate.rest, *(full for name, full in tensors.items() if not name.startswith(prefix))),
        )


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Returns the names by their form without wrappers; by themselves if two forms would be the same."""
    full = list(names)
    short = [".".join(word for word in name.split(".") if word not in _WRAPPERS) for name in full]
    return dict(zip(short if len(set(short)) == len(full) else full, full, strict=True))


def _removed_prefix(part: Mapping[str, str]) -> str:
    """Returns what only the full names have: a common prefix, or wrappers in between."""
    prefixes = {full.removesuffix(name) for name, full in part.items() if name != _SWA_COUNTER}
    if len(prefixes) == 1:
        return prefixes.pop()
    wrappers = {word for full in part.values() for word in full.split(".")} & _WRAPPERS
    return f"{'.'.join(sorted(wrappers))}." if wrappers else ""


def _difference(part: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> str:
    optional = {name for name in expected if name.rpartition(".")[2] == _BATCH_NORM_COUNTER} - part.tensors.keys()
    return describe_difference({n: shape for n, shape in expected.items() if n not in optional}, part.tensors)


def _agreement(part: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Returns how many names are the model's, and how many of those have its shapes."""
    named = [name for name in part.tensors if name in expected]
    return len(named), sum(tuple(part.tensors[name].shape) == expected[name] for name in named)


def _is_equal(one: _Candidate, other: _Candidate) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name])
        for name, tensor in one.tensors.items()
    )


def _unloadable_tensor(part: _Candidate, model: nn.Module) -> str | None:
    """Returns which tensor a copy would round, or fail at when others were copied already; None if there is none."""
    own = model.state_dict()
    for name, tensor in part.tensors.items():
        if tensor.is_meta:
            return f"{name} has no data (it is on the meta device)"
        if tensor.is_quantized or tensor.layout is not torch.strided:
            return f"{name} is {'quantized' if tensor.is_quantized else 'sparse'}, and should be a plain tensor"
        counter = name.rpartition(".")[2] == _BATCH_NORM_COUNTER  # averaged as a float by some EMAs
        kinds = [(each.is_complex(), each.is_floating_point()) for each in (tensor, own[name])]
        if not counter and kinds[0] != kinds[1]:
            dtypes = [str(each.dtype).removeprefix("torch.") for each in (tensor, own[name])]
            return f"{name} is {dtypes[0]} and should be {dtypes[1]}"
    return None


def _describe_choice(chosen: _Candidate, others: Sequence[_Candidate], content: Any) -> str:
    """Returns what was loaded and what was not; empty if the file holds only the weights, under the model's names."""
    beside = [str(name) for name in content if str(name) != chosen.path[0]] if chosen.path else []
    beside = [*beside, *chosen.rest] if not isinstance(content, list | tuple) else list(chosen.rest)
    notes = [f"took the weights under {printable('.'.join(chosen.path))!r}"] if chosen.path else []
    notes += [f"took {printable(chosen.prefix)!r} off their names"] if chosen.prefix else []
    notes += [f"left out {list_names(beside)}"] if beside else []
    notes += [f"{' and '.join(map(str, others[:_MAX_ALTERNATIVES]))} would fit too"] if others else []
    return "; ".join(notes)


def _describe_content(content: Any, depth: int = 0) -> str:
    """Returns what a file without named tensors holds."""
    if not isinstance(content, Mapping) or not content:
        return f"it holds {'a tensor without a name' if isinstance(content, Tensor) else 'no named tensors'}"
    name, value = next(iter(content.items()))
    if isinstance(value, Mapping) and value and depth < _MAX_DEPTH:
        return _describe_content(value, depth + 1)
    return f"{printable(str(name))!r} is not a tensor" if isinstance(name, str) else "its tensors have no names"


def _shard_hint(path: str) -> str:
    return "; the file is one part of several: join them first" if _SHARD_NAME.search(os.path.basename(path)) else ""


# --- reading files without running their code ---


class _StandIn:
    """Replaces settings and metrics in a pickle; it accepts everything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# torch's unpickler fills only dicts and lists.
_CONTAINER_STAND_INS: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda *args: {},
    "collections.deque": lambda *args: [],
}


def _read(path: str) -> Any:
    """Returns the content of a checkpoint; raises UsageError if it cannot be read, or holds code."""
    file = Path(path)
    check_readable(path, file)
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
        if _begins_as_safetensors(head, file):
            return safetensors.torch.load_file(path)
        if kind := _foreign_kind(head, file):
            raise UsageError(f"{path} cannot be read as a checkpoint: it is {kind}")
        if file.suffix == ".safetensors" and not head.startswith((_ZIP, b"\x80")):
            return safetensors.torch.load_file(path)  # raises what is wrong with it
        return _unpickle(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in zipfile, pickle, safetensors or torch
        why = why_unreadable(error)
        # Without torch's error, whose text advises weights_only=False.
        raise UsageError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete or of another kind"
            + (f" ({printable(why)})" if why else "")
        ) from None


def _begins_as_safetensors(head: bytes, file: Path) -> bool:
    """Returns whether a file begins with the length of a header and the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def _foreign_kind(head: bytes, file: Path) -> str | None:
    """Returns the kind of a file that torch does not read, by its first bytes or its zip directory."""
    if not head:
        return "empty"
    known = next((words for start, words in _FOREIGN if head.startswith(start)), None)
    if known:
        return known
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        return "a web page or XML, not weights; fetch the file again, and look at it"
    if text.startswith((b"{", b"[")):
        index = b'"weight_map"' in head or file.name.endswith(".index.json")
        return "the index of weights in several files; join these first" if index else "JSON, not weights"
    return _foreign_archive(file) if head.startswith(_ZIP) else None


def _foreign_archive(file: Path) -> str | None:
    """Returns the kind of a zip file that torch.save did not write, or that would grow when it is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        return "incomplete: the directory at its end is missing or damaged; fetch it again"
    names = {member.filename.rpartition("/")[2] for member in members}
    if "data.pkl" not in names:
        return "a zip file that torch.save did not write; only files of torch.save and safetensors are read"
    if "constants.pkl" in names:
        return "a TorchScript archive; save the model's state_dict() by itself"
    grown = sum(member.file_size for member in members)
    if grown > file.stat().st_size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return f"a compressed archive of {grown:,} bytes, and torch.save compresses nothing"
    return None


def _unpickle(path: str) -> Any:
    """Returns what torch.save wrote, with stand-ins for :data:`_HARMLESS_TYPES`; raises UsageError for other types."""
    names: set[str] = set()
    with suppress(Exception):  # in files of the old format torch names one type after the other
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    for _ in range(_MAX_TYPES):
        code = sorted(name for name in names if not _HARMLESS_TYPES.match(name))
        if code:
            raise UsageError(
                f"{path} holds code ({list_names(code)}), which is never run, and not weights alone; save the model's"
                " state_dict() by itself"
            )
        stand_ins: list[Any] = [(_CONTAINER_STAND_INS.get(name, _StandIn), name) for name in names]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore", UserWarning)  # pickle protocols and sparse tensors are refused
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            unsafe = _unsafe_global(str(error))
            if unsafe is None or unsafe in names:
                raise
            names.add(unsafe)
    raise UsageError(f"{path} cannot be read as a checkpoint: it names more than {_MAX_TYPES} types")


def _unsafe_global(text: str) -> str | None:
    """Returns the type or function that torch refused to look up, according to torch's message."""
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)|Unsupported class (\S+)", text)
    if not match:
        return None
    name = match[1] or match[2]
    return name if "." in name else f"builtins.{name}"
