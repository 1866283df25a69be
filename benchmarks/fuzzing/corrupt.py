"""Corrupted artifacts: a copy of a good folder with one thing wrong, aimed at one of the checks of the loader.

Corrupted weights get a new record of their size and hash, so that the case gets past the hashes. Random bytes and
values seldom get past the schema; corrupted tensors, sites and options do.
"""

from __future__ import annotations

import functools
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch

from ddf_convert.artifacts.artifact import Manifest
from ddf_convert.artifacts.atomic import FileRecord

REFUSED, SAME, EITHER = "refused", "same", "either"  # what must become of a case; SAME: equal outputs
WEIGHTS, ORIGINAL, MANIFEST = "model.safetensors", "original.safetensors", "manifest.json"
ESCAPED = "escaped"  # a file of this name is never opened
LONG = "x" * 100_000
_MONSTERS: tuple[Any, ...] = (
    10**6, 10**9, 2**63, 10**30, -1, -(10**9), 0, 0.5, 1e30, float("nan"), float("inf"), LONG, "", "a\x00b", "é" * 300,
    "\x1b[31mred", "\ud800", f"../../{ESCAPED}",
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    *_MONSTERS, None, True, False, 1, 2, 3, "0", "same", "DDF2d", "DDFUpConv2d", "condconv", "__class__", "forward",
    [], {}, [[]], [1, "a", None], {"a": {"b": []}}, {f"../{ESCAPED}": 1}, [10**6], ["stem", "a"],
)  # fmt: skip
_NAMES = ("", " ", "surprise", "a..b", ".", "é", "a\x00b", "__class__", "forward", f"../../{ESCAPED}", LONG, "con*[1]")
_FLOATS = (torch.float64, torch.float16, torch.bfloat16)
_NOT_WEIGHTS = (
    torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip


@dataclass
class Draft:
    """A copy of a good artifact while it is changed.

    Attributes:
        folder: The copy.
        loader: How it will be loaded: "load", "restore", "original" or "inspect".
        rng: Random numbers.
        manifest: As JSON; written at the end, unless it is None because the corruption wrote the file itself.
        expected: REFUSED, SAME or EITHER.
    """

    folder: Path
    loader: str
    rng: random.Random
    expected: str
    manifest: Any = field(init=False)

    def __post_init__(self) -> None:
        self.manifest = json.loads((self.folder / MANIFEST).read_bytes())

    @property
    def file(self) -> str:
        """The weights that will be loaded."""
        return ORIGINAL if self.loader == "original" else WEIGHTS

    @property
    def shared(self) -> dict[str, str]:
        return self.manifest["shared" if self.file == WEIGHTS else "original_shared"]

    @property
    def replaced(self) -> list[dict[str, Any]]:
        return self.manifest["conversion"]["replaced"]

    def write_weights(self, weights: dict[str, torch.Tensor] | bytes) -> None:
        """Writes weights and their record."""
        path = self.folder / self.file
        if isinstance(weights, bytes):
            path.write_bytes(weights)
        else:
            safetensors.torch.save_file(weights, path)
        key = "weights" if self.file == WEIGHTS else "original"
        self.manifest[key] = FileRecord.of(path).model_dump()


_corruptions: list[tuple[Callable[[Draft], Any], str]] = []


def _corruption(expected: str, weight: int = 1) -> Callable[[Callable[[Draft], Any]], Any]:
    """Registers a function that corrupts a draft and returns details; ``weight`` is how often it is drawn."""

    def register(corruption: Callable[[Draft], Any]) -> Callable[[Draft], Any]:
        _corruptions.extend([(corruption, expected)] * weight)
        return corruption

    return register


def _tensor_corruption(expected: str, weight: int = 1) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function that corrupts the tensors of the weights that will be loaded."""

    def register(change: Callable[..., Any]) -> Any:
        @functools.wraps(change)
        def corruption(draft: Draft) -> Any:
            tensors = safetensors.torch.load_file(draft.folder / draft.file)
            details = change(draft, tensors)
            draft.write_weights(tensors)
            return details

        return _corruption(expected, weight)(corruption)

    return register


def corruption_names() -> list[str]:
    return sorted({corruption.__name__.strip("_") for corruption, _ in _corruptions})


def corrupt(folder: Path, loader: str, rng: random.Random) -> tuple[str, str, str]:
    """Corrupts a copy of a good artifact; returns the corruption's name, its details, and REFUSED, SAME or EITHER."""
    corruption, expected = rng.choice(_corruptions)
    draft = Draft(folder, loader, rng, expected)
    details = corruption(draft)
    if draft.manifest is not None:
        text = json.dumps(draft.manifest, ensure_ascii=rng.random() < 0.7)
        (folder / MANIFEST).write_text(text, encoding="utf-8", errors="surrogatepass")
    return corruption.__name__.strip("_"), f"{details!r:.200}", draft.expected


# --- the tensors ---


Tensors = dict[str, torch.Tensor]


def _name_of_one(draft: Draft, tensors: Tensors, floating: bool = True) -> str:
    return draft.rng.choice([name for name, each in tensors.items() if each.is_floating_point() or not floating])


@_tensor_corruption(REFUSED, 3)
def _dtype(draft: Draft, tensors: Tensors) -> Any:
    chosen, dtype = _name_of_one(draft, tensors), draft.rng.choice(_NOT_WEIGHTS)
    for name in [chosen] if draft.rng.random() < 0.7 else [name for name in tensors if tensors[name].dim() > 1]:
        tensors[name] = tensors[name].to(dtype)
    return chosen, dtype


@_tensor_corruption(EITHER)
def _precision(draft: Draft, tensors: Tensors) -> Any:
    chosen, dtype = _name_of_one(draft, tensors), draft.rng.choice(_FLOATS)
    for name in [chosen] if draft.rng.random() < 0.5 else [name for name in tensors if tensors[name].dim()]:
        tensors[name] = tensors[name].to(dtype)
    return chosen, dtype


@_tensor_corruption(EITHER)
def _values(draft: Draft, tensors: Tensors) -> Any:
    name = _name_of_one(draft, tensors)
    tensors[name].fill_(value := draft.rng.choice((float("nan"), float("inf"), 0.0, 1e38)))
    return name, value


@_tensor_corruption(REFUSED, 3)
def _shape(draft: Draft, tensors: Tensors) -> Any:
    name = _name_of_one(draft, tensors, floating=False)
    shape, rng = list(tensors[name].shape), draft.rng
    if not shape or rng.random() < 0.2:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 2)))
    elif rng.random() < 0.2:
        del shape[rng.randrange(len(shape))]
    else:
        shape[rng.randrange(len(shape))] += rng.choice((-1, 1))
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    return name, shape


@_tensor_corruption(REFUSED, 2)
def _missing(draft: Draft, tensors: Tensors) -> Any:
    del tensors[name := _name_of_one(draft, tensors, floating=False)]
    return name


@_tensor_corruption(REFUSED, 2)
def _extra(draft: Draft, tensors: Tensors) -> Any:
    tensors[name := draft.rng.choice(_NAMES)] = torch.zeros(draft.rng.choice(((), (0,), (2, 3))))
    return name


@_tensor_corruption(REFUSED)
def _renamed(draft: Draft, tensors: Tensors) -> Any:
    name = _name_of_one(draft, tensors, floating=False)
    new = draft.rng.choice((f"module.{name}", f"{name}.", name.upper(), name.replace(".", "_") + "_", *_NAMES))
    tensors[new] = tensors.pop(name)
    return name, new


@_tensor_corruption(REFUSED, 2)
def _shared(draft: Draft, tensors: Tensors) -> Any:
    """Adds shared names that lead to no tensor: in a circle, to another shared name, to nothing."""
    one, two = draft.rng.sample(sorted(tensors), 2)
    circle = {one: two, two: one}
    how = draft.rng.choice(({one: one}, circle, {"a": "b", "b": one}, {one: draft.rng.choice(_NAMES)}))
    for name in how:
        tensors.pop(name, None)
    draft.shared.update(how)
    return how


@_tensor_corruption(EITHER)
def _tied(draft: Draft, tensors: Tensors) -> Any:
    one, two = draft.rng.sample(sorted(tensors), 2)
    draft.shared[one] = two
    if draft.rng.random() < 0.5:
        del tensors[one]
    return one, two


# --- the source and the conversion ---


@_corruption(REFUSED, 3)
def _source(draft: Draft) -> Any:
    source, rng = draft.manifest["source"], draft.rng
    if source["kind"] == "own":
        source["class"] = rng.choice((*_NAMES, "os.system"))
    elif rng.random() < 0.3:
        names = ("vit_giant_patch14_224", "convnext_xxlarge", "resnet5O", "hf-hub:a/b", f"local-dir:../{ESCAPED}")
        source["name"] = rng.choice((*names, *_NAMES))
    elif rng.random() < 0.5:
        key = rng.choice(("num_classes", "in_chans"))
        source["kwargs"][key] = rng.choice((10**7, 10**12, 6, *_MONSTERS))
    else:
        key = rng.choice(("layers", "channels", "stem_width", "pretrained", "checkpoint_path", "cache_dir", "color"))
        source["kwargs"][key] = rng.choice(([10**6], [10**6] * 4, [2, "x"], [], [None] * 4, *_MONSTERS))
    if draft.loader in ("restore", "original"):  # the model is given, and this is for people
        draft.expected = EITHER
    return source


@_corruption(REFUSED, 3)
def _sites(draft: Draft) -> Any:
    steps, rng = draft.replaced, draft.rng
    step = rng.choice(steps)
    name = step["names"][0]
    how = rng.choice(("again", "twice", "gone", "two", "name", "prefix", "part"))
    if how == "again":
        steps.append(json.loads(json.dumps(step)))
    elif how == "twice":
        steps.insert(0, {**step, "names": [name, name, name]})
    elif how == "gone":
        steps.remove(step)
    elif how == "two":
        step["names"] = [name, rng.choice((*_NAMES, "stem", "conv1"))]
    elif how == "prefix":
        step["names"] = [rng.choice((f"module.{name}", f".{name}", f"{name}.", f"{name}.0", name + "()"))]
    elif how == "part":
        step[rng.choice(("removed", "apart"))] = [rng.choice(_NAMES)]
    else:
        step["names"] = [rng.choice(_NAMES)]
    return _conversion_details(draft, how, name)


@_corruption(REFUSED, 4)
def _options(draft: Draft) -> Any:
    """Sets an option out of its range."""
    replacement = draft.rng.choice(draft.replaced)["replacement"]
    options = replacement["mix"] if replacement["mix"] and draft.rng.random() < 0.2 else replacement["options"]
    key = draft.rng.choice((*options, "color"))
    options[key] = value = draft.rng.choice(_MONSTERS)
    return _conversion_details(draft, replacement["layer"], key, value)


def _conversion_details(draft: Draft, *details: Any) -> Any:
    if draft.loader == "original":  # the model before conversion has none of it
        draft.expected = EITHER
    return details


@_corruption(EITHER, 2)
def _other_options(draft: Draft) -> Any:
    """Sets an option to another value, adds or removes one, or takes another layer."""
    replacement, rng = draft.rng.choice(draft.replaced)["replacement"], draft.rng
    options = replacement["options"]
    key, how = rng.choice(sorted(options)), rng.choice(("add", "without", "other", "layer"))
    if how == "without":
        del options[key]
    elif how == "layer":
        replacement["layer"] = key = rng.choice(("DDF2d", "DDFConv2d", "DDFUp2d", "depthwise", "condconv", *_NAMES))
    elif how == "add" and isinstance(options[key], int | float):
        options[key] += rng.choice((-1, 1, 2))
    else:
        options[key] = rng.choice((1, 2, True, 1.5, "add", "same", "reflect", "linear", "relu", *_ODD[:2]))
    return how, key, options.get(key)


# --- the manifest ---


@_corruption(SAME, 2)
def _words(draft: Draft) -> Any:
    """Changes text that only people read."""
    manifest, text = draft.manifest, draft.rng.choice(("", "é", "1.2", "\x1b[31mred", LONG))
    manifest["versions"]["torch"] = manifest["dtype"] = manifest["conversion"]["source"] = text
    return text


@_corruption(EITHER, 2)
def _format(draft: Draft) -> Any:
    """Takes an older format, without the fields that have their defaults. Before format 5 some layers were narrower."""
    formats = get_args(Manifest.model_fields["format_version"].annotation)
    kind = draft.manifest["source"]["kind"]
    draft.manifest = Manifest.model_validate(draft.manifest).model_dump(
        mode="json", by_alias=True, exclude_defaults=True
    )
    draft.manifest["source"]["kind"] = kind
    draft.manifest |= {"format": "ddf_convert", "format_version": draft.rng.choice(formats)}
    return draft.manifest["format_version"]


@_corruption(REFUSED)
def _version(draft: Draft) -> Any:
    draft.manifest["format_version"] = value = draft.rng.choice((0, 99, 10**30, "1", 1.5, None, LONG))
    return value


@_corruption(REFUSED)
def _record(draft: Draft) -> Any:
    record = draft.manifest["weights" if draft.file == WEIGHTS else "original"]
    key, sizes = draft.rng.choice(sorted(record)), (0, -1, 10**30, record["size"] + 1, 1.5)
    record[key] = draft.rng.choice(sizes if key == "size" else ("", "0" * 64, record["sha256"].upper() + " ", LONG))
    return key, record[key]


@_corruption(EITHER, 3)
def _value(draft: Draft) -> Any:
    """Sets, deletes or repeats random places of the manifest."""
    return [_set(draft.manifest, draft.rng) for _ in range(draft.rng.choice((1, 1, 3)))]


def _set(document: Any, rng: random.Random) -> str:
    holder, key, path = rng.choice(_places(document))
    action = rng.choice(("odd", "odd", "delete", "again"))
    if action == "delete":
        del holder[key]
    elif action == "again" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == "again":
        holder[rng.choice(_NAMES)] = holder[key]
    else:
        holder[key] = rng.choice(_ODD)
    return f"{action} {path}"


def _places(value: Any, path: str = "") -> list[tuple[Any, Any, str]]:
    """Returns every place of a JSON document: its container, key and path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in list(items):
        found += [(value, key, f"{path}.{key}"), *_places(inner, f"{path}.{key}")]
    return found


# --- the files ---


@_corruption(EITHER, 3)
def _manifest_bytes(draft: Draft) -> Any:
    data, action = _bytes((draft.folder / MANIFEST).read_bytes(), draft.rng)
    (draft.folder / MANIFEST).write_bytes(data)
    draft.manifest = None
    return action


@_corruption(EITHER, 2)
def _weights_bytes(draft: Draft) -> Any:
    path = draft.folder / draft.file
    before = path.read_bytes()
    data, action = _bytes(before, draft.rng)
    if draft.rng.random() < 0.3 and data != before:
        draft.expected = REFUSED
        path.write_bytes(data)
        return action, "not recorded"
    draft.write_weights(data)
    return action


def _bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    data = bytearray(content)
    action = rng.choice(("flip", "flip", "cut", "insert", "empty", "nested", "append"))
    if action == "flip":
        for _ in range(rng.choice((1, 3, 50))):
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
    elif action == "cut":
        del data[rng.randrange(len(data)) :]
    elif action == "insert":
        place = rng.randrange(min(len(data), 4000))
        data[place:place] = rng.choice((b"\x00", b'"', b"{", b"[", b"\xff\xfe", b"1e999", b"\\u0000"))
    elif action == "append":
        data += rng.choice((b"\x00", b"{}", b"garbage"))
    else:
        data = bytearray(b"" if action == "empty" else b"[" * 100_000)
    return bytes(data), action


@_corruption(EITHER, 4)
def _header(draft: Draft) -> Any:
    """Changes the header of a safetensors file: eight bytes of length, then JSON of dtypes, shapes and offsets."""
    data, rng = (draft.folder / draft.file).read_bytes(), draft.rng
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    action = rng.choice(("length", "value", "dtype", "shape", "data_offsets", "metadata"))
    if action == "value":
        _set(header, rng)
    elif action == "dtype":
        entry["dtype"] = rng.choice(("I32", "F8_E4M3", "F8_E8M0", "F4", "X", "", None, 4))
    elif action == "shape":
        entry["shape"] = rng.choice(([], [0], [-1], [2**62, 2], [1] * 100, [10**12], "x", None, [1.5]))
    elif action == "data_offsets":
        entry[action] = rng.choice(([0, 0], [0, 2**63], [8, 4], [-4, 4], [0], "x", [len(rest), len(rest) + 4]))
    elif action == "metadata":
        header["__metadata__"] = rng.choice(({"format": "tf"}, {"a": 1}, [], "x", {"format": "pt", "x": LONG}))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    wrong = (0, 1, len(text) - 1, len(text) + 1, len(data), 2**32, 2**63, 2**64 - 1)
    draft.write_weights(struct.pack("<Q", rng.choice(wrong) if action == "length" else len(text)) + text + rest)
    return action


@_corruption(SAME)
def _report(draft: Draft) -> Any:
    """Corrupts a file that the load does not need."""
    file = draft.folder / draft.rng.choice(("report.json", ORIGINAL if draft.file == WEIGHTS else WEIGHTS))
    content = draft.rng.choice((None, b"", b"garbage"))
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    return file.name, content


@_corruption(SAME)
def _pending(draft: Draft) -> Any:
    """Imitates a save that was interrupted after its manifest."""
    file = draft.folder / draft.file
    file.rename(f"{file}.new")
    content = draft.rng.choice((None, b"", b"garbage"))
    if content is not None:
        file.write_bytes(content)
    return content
