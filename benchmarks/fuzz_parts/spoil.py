"""Spoilt artifacts: a good folder with a manifest, weights or safetensors header that somebody changed."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

_WEIGHTS = "model.safetensors"
_MANIFEST = "manifest.json"
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**9, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308, float("nan"), float("inf"),
    "", " ", "x", "../../escaped", "/escaped", "a\x00b", "\ud800", "model.safetensors", "é" * 300, "x" * 70_000, "0",
    "__class__", "forward", "DDF2d", "DDFUpConv2d", "condconv", "resnet10t", "same", [], {}, [[]], [1, "a", None],
    {"a": {"b": []}}, {"../x": 1}, ["conv1.3"], ["conv1.3", "conv1.6"],
)  # fmt: skip


def spoil(folder: Path, dice: random.Random) -> str:
    """Changes a copy of a good artifact; returns what was done, in words."""
    way = dice.choice(
        (_manifest_values, _manifest_values, _manifest_values, _manifest_bytes, _header, _header, _weights)
    )
    words = way(folder, dice)
    if dice.random() < 0.7:  # past the check of the hash, so that what comes after it is reached
        _seal(folder)
        words += ", sealed"
    return words


def _seal(folder: Path) -> None:
    """Writes the size and hash that the weights now have into the manifest, if it still can hold them."""
    weights = (folder / _WEIGHTS).read_bytes()
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        manifest["weights"] |= {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8", errors="surrogatepass")


def _manifest_values(folder: Path, dice: random.Random) -> str:
    file = folder / _MANIFEST
    manifest = json.loads(file.read_text())
    done = [_change(manifest, dice) for _ in range(dice.choice((1, 1, 1, 2, 5)))]
    file.write_text(json.dumps(manifest, ensure_ascii=dice.random() < 0.5), encoding="utf-8", errors="surrogatepass")
    return "manifest: " + "; ".join(done)


def _change(document: Any, dice: random.Random) -> str:
    """Changes one value somewhere inside."""
    places = list(_places(document))
    holder, key, path = dice.choice(places)
    action = dice.choice(("odd", "odd", "delete", "duplicate", "swap", "number"))
    if action == "delete":
        del holder[key]
    elif action == "duplicate" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == "duplicate":
        holder[dice.choice(("surprise", "../x", "", "names", "layer", "bytes"))] = holder[key]
    elif action == "swap":
        other, there, _ = dice.choice(places)
        try:
            holder[key], other[there] = other[there], holder[key]
            json.dumps(document)
        except (ValueError, KeyError, IndexError, RecursionError):  # one lies inside the other
            holder[key] = None
    elif action == "number" and isinstance(holder[key], int | float):
        holder[key] = dice.choice((holder[key] + 1, holder[key] * 1000, -holder[key], holder[key] + 0.5))
    else:
        holder[key] = dice.choice(_ODD)
    return f"{action} {path}"


def _places(value: Any, path: str = "") -> list[tuple[Any, Any, str]]:
    """Every place of a JSON document: what holds it, its key, its path."""
    if isinstance(value, dict):
        items: Any = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    found = []
    for key, inner in items:
        found += [(value, key, f"{path}.{key}"), *_places(inner, f"{path}.{key}")]
    return found


def _manifest_bytes(folder: Path, dice: random.Random) -> str:
    return "manifest's bytes: " + _bytes(folder / _MANIFEST, dice)


def _weights(folder: Path, dice: random.Random) -> str:
    return "weights' bytes: " + _bytes(folder / _WEIGHTS, dice, everywhere=True)


def _bytes(file: Path, dice: random.Random, everywhere: bool = False) -> str:
    data = bytearray(file.read_bytes())
    action = dice.choice(("flip", "flip", "cut", "insert", "empty", "nested", "append"))
    if action == "flip":
        for _ in range(dice.choice((1, 3, 50))):
            data[dice.randrange(len(data) if everywhere else min(len(data), 4000))] = dice.randrange(256)
    elif action == "cut":
        del data[dice.randrange(len(data)) :]
    elif action == "insert":
        place = dice.randrange(min(len(data), 4000))
        data[place:place] = dice.choice((b"\x00", b'"', b"{", b"[", b"\xff\xfe", b"1e999", b"\\u0000"))
    elif action == "append":
        data += dice.choice((b"\x00", b"{}", b"garbage"))
    else:
        data = bytearray(b"" if action == "empty" else b"[" * 100_000)
    file.write_bytes(data)
    return action


def _header(folder: Path, dice: random.Random) -> str:
    """The header of a safetensors file: eight bytes of length, then JSON of dtypes, shapes and offsets."""
    file = folder / _WEIGHTS
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = dice.choice(("length", "value", "value", "entry", "dtype", "shape", "offsets", "rename", "metadata"))
    names = [name for name in header if name != "__metadata__"]
    entry = header[dice.choice(names)]
    claimed = None
    if action == "length":
        claimed = dice.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
    elif action == "value":
        _change(header, dice)
    elif action == "entry":
        header[dice.choice(("surprise", "../x", "", "\x00"))] = dict(entry)
    elif action == "dtype":
        entry["dtype"] = dice.choice(("F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "U8", "X", "", None, 4))
    elif action == "shape":
        entry["shape"] = dice.choice(([], [0], [-1], [2**62, 2], [1] * 100, [10**12], "x", None, [1.5]))
    elif action == "offsets":
        entry["data_offsets"] = dice.choice(([0, 0], [0, 2**63], [8, 4], [-4, 4], [0], "x", [len(rest), len(rest) + 4]))
    elif action == "rename":
        name = dice.choice(names)
        header[dice.choice(("x", name + "x", name.upper()))] = header.pop(name)
    else:
        header["__metadata__"] = dice.choice(
            ({"format": "tf"}, {"a": 1}, [], "x", {"format": "pt", "x": "y" * 100_000})
        )
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + rest)
    return f"safetensors header: {action}"
