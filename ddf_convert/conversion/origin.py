"""What a conversion notes in the layers that it makes, so that a part of a model, or a model around it, knows them too.

The record of a conversion belongs to the model that was converted. The note in the layer goes wherever the layer goes:
into copies and pickles, into a larger model, into a part that is saved alone. Layers that a user's class builds itself
have none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ddf_convert.conversion.plan import Replacement

_NOTE = "_ddf_origin"  # an attribute of the layer


@dataclass(frozen=True, eq=False)
class Origin:
    """How a layer came into its model. A layer and the place of the pixel shuffle that went with it have the same one.

    Attributes:
        replacement: What was built.
        call: "conv2d()" or "interpolate_1()" if it replaces a call of a function; "" if it replaces a module.
        removes: Whether a pixel shuffle was replaced with it.
        graph: Path of the module that became a GraphModule for it; "" is the model.
    """

    replacement: Replacement
    call: str = ""
    removes: bool = False
    graph: str = ""


def note(layer: nn.Module, origin: Origin) -> None:
    """Notes where a layer comes from."""
    vars(layer)[_NOTE] = origin


def forget(model: nn.Module) -> None:
    """Removes the notes from a model's layers: they are then part of the code that builds it."""
    for module in model.modules():
        vars(module).pop(_NOTE, None)


def origin_of(module: nn.Module) -> Origin | None:
    """Where a layer comes from; None if no conversion made it."""
    origin = vars(module).get(_NOTE)
    return origin if isinstance(origin, Origin) else None
