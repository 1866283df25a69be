"""The record of conversions: what was replaced in a model, and in parts of it that were converted separately.

The record belongs to the model that was converted. Each new layer also carries its own entry of it, which goes wherever
the layer goes: into copies and pickles, a larger model, a part that is saved alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import fx, nn

from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.interpolate_hook import is_intercepting
from ddf_convert.conversion.plan import Replacement
from ddf_convert.conversion.registry import replacing_layers
from ddf_convert.conversion.sites import is_interpolate_call, join_path, layer_path, owner_of
from ddf_convert.errors import UsageError
from ddf_convert.utils.modules import bare, model_name

_ORIGIN = "_ddf_origin"  # an attribute of the layer


class AppliedReplacement(BaseModel):
    """One convolution, or one upsampling, that was replaced.

    Attributes:
        names: Every path at which it was registered; for a call of a function, its name in the plan.
        replacement: The layer that replaced it.
        removed: Every path of the pixel shuffle that was replaced with it.
        apart: For a call of ``F.interpolate``, the modules inside the calling one that also call it, and stay.
        graph: For a functional convolution, the path of the module that became a GraphModule; "" is the whole model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1)
    replacement: Replacement
    removed: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    graph: str = ""

    @property
    def functional(self) -> bool:
        """Whether it was a convolution called as a function."""
        return self.names[0].endswith("()") and not self.intercepted

    @property
    def intercepted(self) -> bool:
        """Whether it was a call of ``F.interpolate``."""
        return is_interpolate_call(self.names[0])

    @property
    def call(self) -> str:
        """The call that it replaced, without the module that makes it: "conv2d()"; "" if it replaced a module."""
        return self.names[0].rpartition(".")[2] if self.functional or self.intercepted else ""

    @property
    def places(self) -> tuple[str, ...]:
        """Every path of the new layer in the converted model."""
        return tuple(map(layer_path, self.names)) if self.call else self.names


class Conversion(BaseModel):
    """The record of what was done to a model, so that it can be repeated without deciding again.

    Attributes:
        source: The name of the model.
        replaced: Every replacement, in order.
        configs: The options of each conversion; a model can be converted more than once.
        recipe: The recipe that initialized the new layers, as data; None if there was none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    replaced: tuple[AppliedReplacement, ...] = ()
    configs: tuple[ConvertConfig, ...] = ()
    recipe: dict[str, Any] | None = None


def recorded(model: nn.Module) -> Conversion | None:
    """Returns the record of a model's conversion, or None if neither it nor any part of it was converted.

    Conversions of parts count, with names in this model; a part of a converted model has its share of the record.
    Layers that are no longer in the model do not count, nor do DDF layers that the model's own class builds.
    """
    inner = bare(model)
    own = _own_record(inner)
    inside, _ = replacements_in(inner)
    kept = [applied for applied in (own.replaced if own else ()) if _is_still_there(applied, inner)]
    known = {place for applied in kept for place in applied.places}
    more = [applied for applied in inside if known.isdisjoint(applied.places)]
    if own is not None and not more and len(kept) == len(own.replaced):
        return own
    if own is None and not more:
        return None
    parts = [record for part in inner.modules() if part is not inner and (record := _own_record(part)) is not None]
    configs = list(own.configs if own else ())
    configs += [config for part in parts for config in part.configs if config not in configs]
    recipes = [record.recipe for record in (own, *parts) if record is not None and record.recipe is not None]
    same_recipe = all(recipe == recipes[0] for recipe in recipes)
    return Conversion(
        source=own.source if own else model_name(inner),
        replaced=(*kept, *more),
        configs=tuple(configs),
        recipe=recipes[0] if recipes and (same_recipe or (own and own.recipe)) else None,
    )


def check_whole(model: nn.Module) -> None:
    """Checks that the record of a model explains every layer in it that a conversion made.

    Raises:
        UsageError: A part was taken out of a converted model, and half of a replacement is elsewhere.
    """
    inner = bare(model)
    own = _own_record(inner)
    places = {place for applied in (own.replaced if own else ()) for place in (*applied.places, *applied.removed)}
    for place, reason in replacements_in(inner)[1]:
        if place not in places:
            raise UsageError(f"{model_name(inner)}: {place} {reason}; save a module that holds both")


def outstanding(model: nn.Module, replacements: tuple[AppliedReplacement, ...]) -> list[AppliedReplacement]:
    """Returns the replacements that a fresh model still needs: all but those that its constructor made in parts.

    For a model that was converted itself, that is all of them, so that applying them is refused.
    """
    if "ddf_conversion" in vars(model):
        return list(replacements)
    done = {(name, each.replacement.model_dump_json()) for each in replacements_in(model)[0] for name in each.names}
    return [each for each in replacements if (each.names[0], each.replacement.model_dump_json()) not in done]


def _own_record(model: nn.Module) -> Conversion | None:
    conversion = vars(model).get("ddf_conversion")
    return conversion if isinstance(conversion, Conversion) else None


def _is_still_there(applied: AppliedReplacement, model: nn.Module) -> bool:
    for place in applied.places:
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        if origin_of(module) is not None or isinstance(module, replacing_layers()):
            return True
    return False


# --- notes in layers --------------------------------------------------------------------------------------------------


def note_origin(layer: nn.Module, applied: AppliedReplacement) -> None:
    """Notes in a layer how it came into its model; the Identity that replaces a pixel shuffle shares the note."""
    vars(layer)[_ORIGIN] = applied


def forget_origins(model: nn.Module) -> None:
    """Removes the notes from a model's layers: they are then part of the code that builds it."""
    for module in model.modules():
        vars(module).pop(_ORIGIN, None)


def origin_of(module: nn.Module) -> AppliedReplacement | None:
    """Returns the note in a layer, with names in the model that was converted; None if no conversion made it."""
    origin = vars(module).get(_ORIGIN)
    return origin if isinstance(origin, AppliedReplacement) else None


@dataclass
class _Found:
    """Where a layer that a conversion made stands, and the Identity that replaced its pixel shuffle."""

    origin: AppliedReplacement
    layer: list[str] = field(default_factory=list)
    shuffle: list[str] = field(default_factory=list)


def replacements_in(model: nn.Module) -> tuple[list[AppliedReplacement], list[tuple[str, str]]]:
    """Reads from the notes every replacement inside a model, whichever model was converted.

    Returns:
        The replacements, in the order of the module tree; and the layers whose replacement is only half inside the
        model, with what is missing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[tuple[int, int], _Found] = {}
    shuffles: dict[int, list[str]] = {}
    for path, module in modules.items():
        origin = origin_of(module)
        if origin is None or not path:  # a layer by itself was not replaced in anything
            continue
        if isinstance(module, nn.Identity):
            shuffles.setdefault(id(origin), []).append(path)
        else:
            layers.setdefault((id(origin), id(module)), _Found(origin)).layer.append(path)
    replacements: list[AppliedReplacement] = []
    halves: list[tuple[str, str]] = []
    for (origin_id, _), found in layers.items():
        found.shuffle = shuffles.pop(origin_id, [])
        if missing := _missing_half(found, modules):
            halves.append((found.layer[0], missing))
        else:
            replacements.append(_as_replacement(found, modules))
    for paths in shuffles.values():
        halves.append((paths[0], "was replaced together with a convolution that is not in it"))
    return replacements, halves


def _missing_half(found: _Found, modules: dict[str, nn.Module]) -> str:
    """Says what a replacement needs and the model does not hold; "" if it is whole."""
    if found.origin.removed and not found.shuffle:
        return "was replaced together with a pixel shuffle that is not in it"
    if found.origin.call and _caller(found.layer[0], modules) is None:
        return "replaces a call of a function, and the code that calls it is not in it"
    return ""


def _caller(path: str, modules: dict[str, nn.Module]) -> str | None:
    """Returns the module that calls a layer instead of a function: one that interpolates, or a GraphModule around."""
    owner = owner_of(path)
    if is_intercepting(type(modules[owner])):
        return owner
    while owner and not isinstance(modules[owner], fx.GraphModule):
        owner = owner_of(owner)
    return owner if isinstance(modules[owner], fx.GraphModule) else None


def _as_replacement(found: _Found, modules: dict[str, nn.Module]) -> AppliedReplacement:
    replacement = found.origin.replacement
    if not found.origin.call:
        return AppliedReplacement(names=tuple(found.layer), replacement=replacement, removed=tuple(found.shuffle))
    name = join_path(owner_of(found.layer[0]), found.origin.call)
    caller = _caller(found.layer[0], modules)
    assert caller is not None
    if isinstance(modules[caller], fx.GraphModule):
        graph = "" if is_interpolate_call(name) else caller
        return AppliedReplacement(names=(name,), replacement=replacement, graph=graph)
    prefix = f"{caller}." if caller else ""
    apart = [
        path
        for path, module in modules.items()
        if path.startswith(prefix) and path != caller and is_intercepting(type(module))
    ]
    return AppliedReplacement(names=(name,), replacement=replacement, apart=tuple(apart))
