"""Docstrings are written for reading in the source; what Markdown would take amiss, and what griffe cannot see."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
CODE = re.compile(r"(`+.*?`+)", re.DOTALL)
TIMES = re.compile(r"(?<=[\w)])\*(?=[\w(])")  # s*s*C is a product, and no emphasis


class Docstrings(griffe.Extension):
    """Turns names as Sphinx writes them (``:class:`DDF2d` ``) into links, and keeps products."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring."""
        if obj.docstring:
            parts = CODE.split(ROLE.sub(lambda found: _link(obj, found[1]), obj.docstring.value))
            parts[::2] = [TIMES.sub(r"\\*", part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Shows types without their validators, and pydantic's fields by their descriptions and defaults."""
        if isinstance(attr.annotation, griffe.Expr):
            attr.annotation = _without_validators(attr.annotation)
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "Field":
            options = {each.name: each.value for each in attr.value.arguments if isinstance(each, griffe.ExprKeyword)}
            attr.value = options.get("default")
            if attr.docstring is None and "description" in options:
                attr.docstring = griffe.Docstring(ast.literal_eval(str(options["description"])), parent=attr)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """``ddf_convert.plan`` is the function; griffe takes it for the module beside it, which has the same name."""
        if pkg.name == "ddf_convert":
            pkg.set_member("plan", griffe.Alias("plan", "ddf_convert.conversion.planner.plan", parent=pkg))


def _link(obj: griffe.Object, name: str) -> str:
    """A link if the reference holds the object (``optional``), else its name as code."""
    shown = f"<code>{name}</code>"
    try:
        return f'<autoref identifier="{obj.resolve(name)}" optional>{shown}</autoref>'
    except griffe.NameResolutionError:
        return shown


def _without_validators(annotation: Any) -> Any:
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Annotated":
        return annotation.slice.elements[0] if isinstance(annotation.slice, griffe.ExprTuple) else annotation
    if isinstance(annotation, griffe.ExprBinOp):
        annotation.left, annotation.right = map(_without_validators, (annotation.left, annotation.right))
    return annotation
