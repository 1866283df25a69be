"""Rewriting: a plan applied to a model, and the record of it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import fx, nn

from ddf_convert.conversion.parts import is_still_there, steps_in
from ddf_convert.conversion.plan import ConvertConfig, Plan
from ddf_convert.conversion.planner import plan as make_plan
from ddf_convert.conversion.rewriter import Replaced, prepare, steps_of, swap
from ddf_convert.conversion.tracer import build_graph, describe
from ddf_convert.errors import UsageError
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.fake_copy import trainable_copy
from ddf_convert.utils.modules import bare


class Conversion(BaseModel):
    """What was done to a model, in order, so that it can be done again without deciding again.

    Attributes:
        source: The model, in words.
        replaced: Every replacement, in order.
        configs: The options of each conversion; a model can be converted more than once.
        recipe: The recipe that the new layers were initialized by, as data; None if there was none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    replaced: tuple[Replaced, ...] = ()
    configs: tuple[ConvertConfig, ...] = ()
    recipe: dict[str, Any] | None = None


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    example_input: ExampleInput | None = None,
    inplace: bool = False,
    as_graph: bool = False,
    **options: Any,
) -> nn.Module:
    """Applies a plan to a model, or plans and applies in one step.

    The model keeps its class, its methods and the names of its other parameters; the modules are swapped in the tree.
    Only where a convolution that is called as a function is replaced (``functional=True``) does a torch.fx GraphModule
    take the model's place: in it, ``self.training`` has the value that it has now wherever the forward pass reads it.
    New layers take the device, dtype, training mode and plain attributes of the module that they replace, and are
    trainable, also where that was frozen. They are drawn from
    torch's CPU generator, whose state is left as it was. The record of what was done is ``model.ddf_conversion``.

    Args:
        model: The model that the plan was made for.
        plan: What to do; None makes a plan from ``example_input`` and the options.
        example_input: As for ``plan``; only without a plan.
        inplace: Change the model itself instead of a copy.
        as_graph: Return the converted model's torch.fx GraphModule, with the DDF layers as nodes.
        **options: As for ``plan``; only without a plan.

    Returns:
        The converted copy, or the model itself if ``inplace``; in an ``nn.DataParallel`` if the model is.

    Raises:
        UsageError: The plan does not fit the model, or cannot be made. The model is then as it was.
    """
    if plan is None:
        if example_input is None:
            raise UsageError("convert needs a plan, or an example_input to make one")
        plan = make_plan(model, example_input, **options)
    elif example_input is not None or options:
        given = [*options, *(["example_input"] if example_input is not None else [])]
        raise UsageError(f"convert was given a plan and also {', '.join(given)}: those belong to plan()")
    inner = bare(model)
    steps = steps_of(plan, inner)
    before = recorded(inner)
    conversion = Conversion(
        source=before.source if before else describe(inner),
        replaced=(*(before.replaced if before else ()), *steps),
        configs=(*(before.configs if before else ()), plan.config),
    )
    if inplace and plan.functional:
        raise UsageError(
            "convolutions that are called as functions cannot be replaced in place: the model becomes a GraphModule;"
            " leave inplace out, or skip them in the plan"
        )
    layers = prepare(inner, steps)
    if not inplace:
        model = _copied(model)
        inner = bare(model)
    converted = swap(inner, layers)
    if as_graph and not isinstance(converted, fx.GraphModule):
        converted = build_graph(converted, describe(inner))
    inner.ddf_conversion = converted.ddf_conversion = conversion  # type: ignore[assignment]
    if converted is inner:
        return model
    return type(model)(converted) if model is not inner else converted


def recorded(model: nn.Module) -> Conversion | None:
    """The record of a model's conversion, if it or any part of it was converted.

    Conversions of parts count under their prefix, whoever put the parts into the model; a part of a converted model has
    its share of the record. Layers that are no longer in the model do not count. Nor do DDF layers that no conversion
    made: the model's own class builds those.
    """
    inner = bare(model)
    own = _own_record(inner)
    steps, _ = steps_in(inner)
    kept = [step for step in (own.replaced if own else ()) if is_still_there(step, inner)]
    known = {place for step in kept for place in step.places}
    more = [step for step in steps if known.isdisjoint(step.places)]
    if own is not None and not more and len(kept) == len(own.replaced):
        return own
    if own is None and not more:
        return None
    parts = [record for part in inner.modules() if part is not inner and (record := _own_record(part)) is not None]
    configs = list(own.configs if own else ())
    configs += [config for part in parts for config in part.configs if config not in configs]
    recipes = [record.recipe for record in (own, *parts) if record is not None and record.recipe is not None]
    alike = all(recipe == recipes[0] for recipe in recipes)
    return Conversion(
        source=own.source if own else describe(inner),
        replaced=(*kept, *more),
        configs=tuple(configs),
        recipe=recipes[0] if recipes and (alike or (own and own.recipe)) else None,
    )


def check_whole(model: nn.Module) -> None:
    """Checks that the record of a model explains every layer in it that a conversion made.

    Raises:
        UsageError: A part was taken out of a converted model, and half of what was replaced together is elsewhere.
    """
    inner = bare(model)
    own = _own_record(inner)
    places = {place for step in (own.replaced if own else ()) for place in (*step.places, *step.removed)}
    for place, reason in steps_in(inner)[1]:
        if place not in places:
            raise UsageError(f"{describe(inner)}: {place} {reason}; save a module that holds both")


def _own_record(model: nn.Module) -> Conversion | None:
    conversion = vars(model).get("ddf_conversion")
    return conversion if isinstance(conversion, Conversion) else None


def _copied(model: nn.Module) -> nn.Module:
    try:
        return trainable_copy(model)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be copied: {error}; convert it in place with inplace=True"
        ) from error
