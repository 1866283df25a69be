"""Recipe files: YAML that is read with line numbers, for errors that say where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import AliasChoices, BaseModel, ValidationError

from ddf_convert.errors import UsageError, first_line, suggestion
from ddf_convert.recipes.recipe import Recipe

_BUILTIN = resources.files("ddf_convert.recipes") / "builtin"
_MAX_BYTES = 2**20  # a recipe is a page of text
_MAX_VALUES = 20_000
_Path = tuple[str | int, ...]


def names() -> list[str]:
    """Returns the names of the built-in recipes."""
    return sorted(Path(file.name).stem for file in _BUILTIN.iterdir() if file.name.endswith(".yaml"))


def load(recipe: str | os.PathLike[str]) -> Recipe:
    """Loads a recipe by name, or from a file.

    Args:
        recipe: The name of a built-in recipe; or a path, which has a ``/`` in it or ends in ``.yaml`` or ``.yml``.

    Raises:
        UsageError: There is no such recipe, or it is invalid: the message names the file, the line and the key.
    """
    path = os.fspath(recipe)
    if path in names():
        return parse(source(path), f"recipe {path}")
    if not path.endswith((".yaml", ".yml")) and os.sep not in path:
        raise UsageError(
            f"unknown recipe {path!r}: there are {', '.join(names())}, and files that end in"
            f" .yaml{suggestion(path, names())}"
        )
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"recipe {path}: cannot be read: {reason}") from error
    return parse(text, path)


def source(name: str) -> str:
    """Returns the text of a built-in recipe's file, with its comments.

    Raises:
        UsageError: There is no built-in recipe of this name.
    """
    if name not in names():
        raise UsageError(f"unknown recipe {name!r}: there are {', '.join(names())}{suggestion(name, names())}")
    return (_BUILTIN / f"{name}.yaml").read_text(encoding="utf-8")


def parse(text: str, where: str = "recipe") -> Recipe:
    """Reads a recipe from the text of a file.

    Args:
        text: YAML.
        where: Name of the file in errors.

    Raises:
        UsageError: It is invalid: the message names the line and the key.
    """
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{where}: not a recipe: it has more than {_MAX_BYTES:,} bytes")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _check_size(root, where)
        content = None if root is None else loader.construct_document(root)
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"{where}: not a recipe: it is nested too deeply") from error
    except Exception as error:  # YAML's own errors, and those of constructors: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(content, dict) or root is None:
        raise UsageError(f"{where}: not a recipe: it should be keys and values, name: and stages: among them")
    lines = dict(_lines(root, where))
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UsageError(_describe(error, lines, where)) from error


def _check_size(root: Any, where: str) -> None:
    """Raises a UsageError for a document that is too large once its aliases are written out, or that holds itself."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MAX_VALUES + 1  # for a node inside itself
            inner = [each for item in node.value for each in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if size(root) > _MAX_VALUES:
        raise UsageError(f"{where}: not a recipe: it has more than {_MAX_VALUES:,} values, aliases written out")


def _lines(node: Any, where: str, path: _Path = ()) -> Iterator[tuple[_Path, int]]:
    """Yields the path and the line of every key and item."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise UsageError(f"{where}:{line}: {'.'.join(map(str, (*path, key.value)))} stands there twice")
            seen.add(key.value)
            yield (*path, key.value), line
            yield from _lines(value, where, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*path, index), value.start_mark.line + 1
            yield from _lines(value, where, (*path, index))


def _describe(error: ValidationError, lines: dict[_Path, int], where: str) -> str:
    """The first error, with its line and key in the file, and the number of others."""
    errors = error.errors()
    first = errors[0]
    path: _Path = tuple(first["loc"])
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = _unknown_key(path)
    elif first["type"] == "missing":
        message = "is missing"
    place = ".".join(map(str, path)) or "recipe"
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}{'' if line is None else f':{line}'}: {place}: {message}{others}"


def _unknown_key(path: _Path) -> str:
    model: type[BaseModel] = Recipe
    for key in path[:-1]:
        if isinstance(key, str):
            parts = next(_models(annotation) for keys, annotation in _fields(model) if key in keys)
            if not parts:
                return "unknown key"
            model = parts[0]
    for keys, _ in _fields(model):
        if path[-1] in keys:
            return f"is the old name of {keys[0]}, which is given too; keep one of the two"
    return f"unknown key{suggestion(str(path[-1]), [keys[0] for keys, _ in _fields(model)])}"


def _fields(model: type[BaseModel]) -> list[tuple[list[str], Any]]:
    """The keys of each field, the one in use first, and its annotation."""
    return [
        (
            [str(key) for key in alias.choices]
            if isinstance(alias := field.validation_alias, AliasChoices)
            else [str(alias or name)],
            field.annotation,
        )
        for name, field in model.model_fields.items()
    ]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
