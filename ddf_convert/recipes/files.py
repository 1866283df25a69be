"""Recipe files: YAML, read with line numbers, so that an error says where it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ddf_convert.errors import UsageError, first_line, suggestion
from ddf_convert.recipes.recipe import Recipe

_BUILTIN = resources.files("ddf_convert.recipes") / "builtin"
_LARGEST = 2**20  # bytes; a recipe is a page of text
_MOST_VALUES = 20_000
_Path = tuple[str | int, ...]


def names() -> list[str]:
    """Of the built-in recipes."""
    return sorted(Path(file.name).stem for file in _BUILTIN.iterdir() if file.name.endswith(".yaml"))


def load(recipe: str | os.PathLike[str]) -> Recipe:
    """A recipe by name, or from a file.

    Args:
        recipe: The name of a built-in recipe; or a path, which has a ``/`` in it or ends in ``.yaml`` or ``.yml``.

    Raises:
        UsageError: There is no such recipe, or it is not right: the message names the file, the line and the key.
    """
    asked = os.fspath(recipe)
    if asked in names():
        return parse((_BUILTIN / f"{asked}.yaml").read_text(encoding="utf-8"), f"recipe {asked}")
    if not asked.endswith((".yaml", ".yml")) and os.sep not in asked:
        raise UsageError(
            f"unknown recipe {asked!r}: there are {', '.join(names())}, and files that end in"
            f" .yaml{suggestion(asked, names())}"
        )
    try:
        with Path(asked).open("rb") as file:
            text = file.read(_LARGEST + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise UsageError(f"recipe {asked}: cannot be read: {reason}") from error
    return parse(text, asked)


def source(name: str) -> str:
    """The text of a built-in recipe's file, comments and all.

    Raises:
        UsageError: There is none of this name.
    """
    if name not in names():
        raise UsageError(f"unknown recipe {name!r}: there are {', '.join(names())}{suggestion(name, names())}")
    return (_BUILTIN / f"{name}.yaml").read_text(encoding="utf-8")


def parse(text: str, where: str = "recipe") -> Recipe:
    """A recipe from the text of a file.

    Args:
        text: YAML.
        where: What to call it in errors.

    Raises:
        UsageError: It is not right: the message names the line and the key.
    """
    if len(text) > _LARGEST:
        raise UsageError(f"{where}: not a recipe: it has more than {_LARGEST:,} bytes")
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
    except Exception as error:  # besides YAML's own, whatever a scalar that says what it is cannot be made into
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
        raise UsageError(_in_words(error, lines, where)) from error


def _check_size(root: Any, where: str) -> None:
    """Whether a document stays small once its aliases are written out, which may be aliases of aliases.

    Raises:
        UsageError: It does not, or holds itself.
    """
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES + 1  # for what is inside of itself
            inner = [each for item in node.value for each in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size, inner))
        return sizes[id(node)]

    if size(root) > _MOST_VALUES:
        raise UsageError(f"{where}: not a recipe: it has more than {_MOST_VALUES:,} values, aliases written out")


def _lines(node: Any, where: str, path: _Path = ()) -> Iterator[tuple[_Path, int]]:
    """The line of every key and item, by its path."""
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


def _in_words(error: ValidationError, lines: dict[_Path, int], where: str) -> str:
    """The first fault and the number of others; every fault is named after its place in the file."""
    faults = error.errors()
    fault = faults[0]
    path: _Path = tuple(fault["loc"])
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key{suggestion(str(path[-1]), _keys(path[:-1]))}"
    elif fault["type"] == "missing":
        message = "is missing"
    place = ".".join(map(str, path)) or "recipe"
    others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where}{'' if line is None else f':{line}'}: {place}: {message}{others}"


def _keys(path: _Path) -> list[str]:
    """The keys that may stand at a path."""
    model: type[BaseModel] = Recipe
    for step in path:
        if isinstance(step, str):
            found = _models(_fields(model)[step])
            if not found:
                return []
            model = found[0]
    return list(_fields(model))


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
