"""Weights by name: reading foreign checkpoints without running anything in them, and telling what does not fit."""

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

from ddf_convert.artifacts.atomic import check_readable
from ddf_convert.artifacts.extra_state import extra_state_names, without_extra_states
from ddf_convert.errors import UsageError
from ddf_convert.utils.fake_copy import meta_copy
from ddf_convert.utils.logging import warn

_SHOWN = 3  # names in an error
_DEEPEST = 6  # mappings in mappings that are looked into

# What wrappers put into the names of parameters: DataParallel and DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BOOKKEEPING = {"n_averaged"}  # of torch.optim.swa_utils.AveragedModel: no tensor of the model
_COUNTER = "num_batches_tracked"  # of BatchNorm: checkpoints of before PyTorch 0.4.1 lack it
_AVERAGED = re.compile(r"(?:^|[._])ema(?:[._]|$)", re.IGNORECASE)
_OF_TRAINING = re.compile(r"optim|grad|momentum|exp_avg")  # holds tensors with the weights' names that are not weights
# Where several mappings fit: timm's order, with the averaged weights of other libraries before what is not averaged.
_TIMMS_AVERAGED = ("state_dict_ema", "model_ema")
_TIMMS = ("state_dict", "model")

# Types that hold settings and figures. Where a pickle names one of them, an object that does nothing takes its place.
_DATA = re.compile(
    r"(?:numpy|pathlib|datetime|omegaconf|yacs|typing)\.|"
    r"(?:argparse\.Namespace|types\.SimpleNamespace|collections\.(?:deque|defaultdict)|decimal\.Decimal|uuid\.UUID|"
    r"builtins\.(?:complex|slice|set|frozenset|range|bytearray|dict|list|tuple|int|float|str|bool))$"
)
_MOST_TYPES = 64  # of those in one file
_MOST_PREFIXES = 16  # that are tried
_LONGEST = 80  # characters of a name in an error
_HEAD = 4096  # bytes that say what a file is
_ZIP = b"PK\x03\x04"
_PART = re.compile(r"-0*\d+-of-0*(?!1\D)\d+\.")

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
    """Loads foreign weights into a model, in place: all of them or, if anything does not fit, none.

    The weights may lie beside other things, such as an optimizer's state and the number of an epoch, under any key
    ("state_dict", "model_state_dict", "net", "params", ...), and their names may have a prefix in common ("module.",
    "_orig_mod.", "model.", ...). What fits the model in all names and shapes is taken, and a warning says what that
    was. Where several mappings fit, averaged weights (EMA) go first, then "state_dict" and "model", as in timm.

    Args:
        model: The model that the weights belong to (before conversion, for weights of the unconverted model).
        file: A safetensors file, or one of torch.save that holds tensors and plain values alone.

    Raises:
        UsageError: There is no such file, it is not a checkpoint, it holds code (which is never run), its names,
            shapes or dtypes are not the model's, or several different mappings fit equally well.
    """
    path = os.fspath(file)
    content = _read(path)
    expected = state_of(model)
    candidates = [each for each in _candidates(content) if not _OF_TRAINING.search(".".join(each.path))]
    if not candidates:
        raise UsageError(f"{path} is not a checkpoint of weights: {_without_tensors(content)}")
    chosen, others = _choose(path, model, candidates, expected)
    own = model.state_dict()
    model.load_state_dict({name: chosen.tensors.get(name, own[name]) for name in expected})
    notice = _notice(chosen, others, content)
    if notice:
        warn(f"{path}: {notice}")


def state_of(module: nn.Module, extra_states: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state dict.

    Args:
        module: Any module.
        extra_states: With the modules' extra states, which then have to be tensors.

    Raises:
        UsageError: The state holds something besides tensors.
    """
    copied, left_out = meta_copy(module), set[str]()
    if not extra_states:
        left_out = extra_state_names(copied)
        without_extra_states(copied)
    state = {name: value for name, value in copied.state_dict().items() if name not in left_out}
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UsageError(f"{type(module).__name__}: {odd[0]} is not a tensor, and only tensors are saved and loaded")
    return {name: tuple(value.shape) for name, value in state.items()}


def describe_difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor] | Mapping[str, tuple[int, ...]]
) -> str:
    """What is missing, what is too much, and what has another shape, in one line; empty if all is right."""
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in found.items()}
    reshaped = [
        f"{name} is {_size(shapes[name])} and should be {_size(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    parts = [("missing", missing), ("not in the model", surplus), ("of another shape", reshaped)]
    return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in parts if names)


def why_unreadable(error: BaseException) -> str:
    """Why torch cannot read a file, in one line and without its advice to read it unsafely; empty if that was all."""
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


# --- which of the tensors in a file are the model's ---


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A mapping in a checkpoint that holds tensors, or the part of one under a prefix.

    Attributes:
        path: The keys that lead to it.
        tensors: By name.
        prefix: What was taken off the names; "" if nothing.
        rest: Names in the mapping that are left out.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    prefix: str = ""
    rest: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = repr(".".join(self.path)) if self.path else ""
        prefix = f"prefix {self.prefix!r}" if self.prefix else ""
        return " with ".join(each for each in (where, prefix) if each) or "the file's own names"

    @property
    def rank(self) -> int:
        """Lower ones go first where several fit."""
        first = self.path[0] if len(self.path) == 1 else None
        if first in _TIMMS_AVERAGED:
            return _TIMMS_AVERAGED.index(first)
        if _AVERAGED.search(".".join((*self.path, self.prefix))):
            return 2
        return 3 + _TIMMS.index(first) if first in _TIMMS else 5


def _candidates(content: Any) -> list[_Candidate]:
    """The mappings in a checkpoint that hold tensors under names. A hostile file can contain itself, or all twice."""
    found: list[_Candidate] = []
    seen: set[int] = set()

    def look(value: Any, path: tuple[str, ...]) -> None:
        if id(value) in seen or len(path) > _DEEPEST:
            return
        if isinstance(value, Mapping):
            seen.add(id(value))
            tensors = {name: each for name, each in value.items() if isinstance(name, str) and isinstance(each, Tensor)}
            if tensors:
                rest = tuple(str(name) for name in value if name not in tensors)
                found.append(_Candidate(path, tensors, rest=rest))
            for name, each in value.items():
                look(each, (*path, str(name)))
        elif isinstance(value, list | tuple):
            seen.add(id(value))
            for place, each in enumerate(value):
                look(each, (*path, str(place)))

    look(content, ())
    return found


def _choose(
    path: str, model: nn.Module, candidates: list[_Candidate], expected: Mapping[str, tuple[int, ...]]
) -> tuple[_Candidate, list[_Candidate]]:
    """The one that fits, and the others that would.

    Raises:
        UsageError: None fits, or several do.
    """
    parts = [part for candidate in candidates for part in _without_prefix(candidate, expected)]
    fitting = sorted((part for part in parts if not _difference(part, expected)), key=lambda part: part.rank)
    if not fitting:
        nearest = max(parts, key=lambda part: (_agreement(part, expected), -part.rank))
        where = f" ({nearest})" if nearest.path or nearest.prefix else ""
        raise UsageError(
            f"{path}{where} does not fit {type(model).__name__}: {_difference(nearest, expected)}{_hint(path)}"
        )
    best = [part for part in fitting if part.rank == fitting[0].rank]
    if any(not _same(best[0], part) for part in best[1:]):
        raise UsageError(
            f"{path} holds several mappings that fit {type(model).__name__}: {' and '.join(map(str, best))}; save the"
            " one that is meant by itself"
        )
    wrong = _wrong_kind(best[0], model)
    if wrong:
        raise UsageError(f"{path} does not fit {type(model).__name__}: {wrong}")
    return best[0], [part for part in fitting if all(part is not each for each in best)]


def _without_prefix(candidate: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> Iterator[_Candidate]:
    """The parts of a mapping whose names, without a prefix, are those of the model; the fullest one first."""
    wanted = _unwrapped(expected)
    tensors = _unwrapped(candidate.tensors)
    prefixes: Counter[str] = Counter()
    for name in tensors:
        words = name.split(".")
        endings = (place for place in range(len(words)) if ".".join(words[place:]) in wanted)
        prefixes.update(".".join((*words[:place], "")) for place in endings)
    for prefix, _ in prefixes.most_common(_MOST_PREFIXES) or [("", 0)]:
        part = {name.removeprefix(prefix): full for name, full in tensors.items() if name.startswith(prefix)}
        yield _Candidate(
            candidate.path,
            {
                wanted.get(name, full): candidate.tensors[full]
                for name, full in part.items()
                if name in wanted or name not in _BOOKKEEPING
            },
            _taken_off(part),
            (*candidate.rest, *(full for name, full in tensors.items() if not name.startswith(prefix))),
        )


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """The names, by what they are without wrappers; by themselves if two would become one."""
    full = list(names)
    short = [".".join(word for word in name.split(".") if word not in _WRAPPERS) for name in full]
    return dict(zip(short if len(set(short)) == len(full) else full, full, strict=True))


def _taken_off(part: Mapping[str, str]) -> str:
    """What the full names have that the short ones have not: a prefix, if it is the same one, or words in between."""
    starts = {full.removesuffix(name) for name, full in part.items() if name not in _BOOKKEEPING}
    if len(starts) == 1:
        return starts.pop()
    words = {word for full in part.values() for word in full.split(".")} & _WRAPPERS
    return f"{'.'.join(sorted(words))}." if words else ""


def _difference(part: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> str:
    needed = {n: shape for n, shape in expected.items() if n in part.tensors or n.rpartition(".")[2] != _COUNTER}
    return describe_difference(needed, part.tensors)


def _agreement(part: _Candidate, expected: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """How many names are the model's, and how many shapes of those."""
    named = [name for name in part.tensors if name in expected]
    return len(named), sum(tuple(part.tensors[name].shape) == expected[name] for name in named)


def _same(one: _Candidate, other: _Candidate) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor.dtype == other.tensors[name].dtype and torch.equal(tensor, other.tensors[name])
        for name, tensor in one.tensors.items()
    )


def _wrong_kind(part: _Candidate, model: nn.Module) -> str | None:
    """Which tensor cannot be taken over as it is: a copy would round, or fail when others were copied already."""
    own = model.state_dict()
    for name, tensor in part.tensors.items():
        if tensor.is_meta:
            return f"{name} has no data (it is on the meta device)"
        if tensor.is_quantized or tensor.layout is not torch.strided:
            return f"{name} is {'quantized' if tensor.is_quantized else 'sparse'}, and should be a plain tensor"
        counter = name.rpartition(".")[2] == _COUNTER  # averaged as a float by some EMAs
        if not counter and _kind(tensor) != _kind(own[name]):
            return f"{name} is {_words(tensor)} and should be {_words(own[name])}"
    return None


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_complex(), tensor.is_floating_point()


def _words(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _notice(chosen: _Candidate, others: Sequence[_Candidate], content: Any) -> str:
    """What was taken and what was not; empty if the file holds the model's weights by their names and nothing else."""
    beside = [str(name) for name in content if str(name) != chosen.path[0]] if chosen.path else []
    beside = [*beside, *chosen.rest] if not isinstance(content, list | tuple) else list(chosen.rest)
    taken = [f"took the weights under {_brief('.'.join(chosen.path))!r}"] if chosen.path else []
    taken += [f"took {_brief(chosen.prefix)!r} off their names"] if chosen.prefix else []
    taken += [f"left out {_first(beside)}"] if beside else []
    taken += [f"{' and '.join(map(str, others[:_SHOWN]))} would fit too"] if others else []
    return "; ".join(taken)


def _without_tensors(content: Any, depth: int = 0) -> str:
    """What there is in the place of tensors."""
    if not isinstance(content, Mapping) or not content:
        return f"it holds {'a tensor without a name' if isinstance(content, Tensor) else 'no named tensors'}"
    name, value = next(iter(content.items()))
    if isinstance(value, Mapping) and value and depth < _DEEPEST:
        return _without_tensors(value, depth + 1)
    return f"{_brief(str(name))!r} is not a tensor" if isinstance(name, str) else "its tensors have no names"


def _hint(path: str) -> str:
    return "; the file is one part of several: join them first" if _PART.search(os.path.basename(path)) else ""


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(_brief, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _brief(name: str) -> str:
    """A name from a file that can hold anything, for people."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name[:_LONGEST])
    return printable + ("..." if len(name) > _LONGEST else "")


# --- files of others ---


class _Ignored:
    """What takes the place of settings and figures in a pickle: it accepts everything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _ignored_mapping(*args: Any) -> dict[Any, Any]:
    return {}


def _ignored_list(*args: Any) -> list[Any]:
    return []


# torch fills only dicts and lists.
_FILLED: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": _ignored_mapping,
    "collections.deque": _ignored_list,
}


def _read(path: str) -> Any:
    """What a file holds, whatever it is; nothing in it is run.

    Raises:
        UsageError: It is not there, is no checkpoint, or holds code.
    """
    file = Path(path)
    check_readable(path, file)
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
        if _begins_as_safetensors(head, file):
            return safetensors.torch.load_file(path)
        foreign = _foreign(head, file)
        if foreign:
            raise UsageError(f"{path} cannot be read as a checkpoint: it is {foreign}")
        if file.suffix == ".safetensors" and not head.startswith((_ZIP, b"\x80")):
            return safetensors.torch.load_file(path)  # says what is wrong with it
        return _unpickled(path)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in zipfile, pickle, safetensors or torch
        why = why_unreadable(error)
        # Without torch's error, whose text advises weights_only=False.
        raise UsageError(
            f"{path} cannot be read as a checkpoint: it is damaged, incomplete or of another kind"
            + (f" ({_brief(why)})" if why else "")
        ) from None


def _begins_as_safetensors(head: bytes, file: Path) -> bool:
    """Whether the length of a header comes first, and then the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size


def _foreign(head: bytes, file: Path) -> str | None:
    """What a file is if torch does not read it, by its first bytes or by the directory of a zip file."""
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
    """The same of a zip file, and whether it would grow when it is read: torch.save compresses nothing."""
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


def _unpickled(path: str) -> Any:
    """What torch.save wrote. Types of :data:`_DATA` become objects that do nothing; other types are refused.

    Raises:
        UsageError: It names other types or functions.
    """
    names: set[str] = set()
    with suppress(Exception):  # only new files can be asked; of old ones torch names one after the other
        names.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    for _ in range(_MOST_TYPES):
        code = sorted(name for name in names if not _DATA.match(name))
        if code:
            raise UsageError(
                f"{path} holds code ({_first(code)}), which is never run, and not weights alone; save the model's"
                " state_dict() by itself"
            )
        stand_ins: list[Any] = [(_FILLED.get(name, _Ignored), name) for name in names]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore", UserWarning)  # of pickle protocols and sparse tensors: both are refused
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            unsafe = _unsafe_global(str(error))
            if unsafe is None or unsafe in names:
                raise
            names.add(unsafe)
    raise UsageError(f"{path} cannot be read as a checkpoint: it names more than {_MOST_TYPES} types")


def _unsafe_global(text: str) -> str | None:
    """The type or function that torch refused to look up, by torch's message."""
    found = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)|Unsupported class (\S+)", text)
    if not found:
        return None
    name = found[1] or found[2]
    return name if "." in name else f"builtins.{name}"
