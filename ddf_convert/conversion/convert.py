"""Conversion: a plan applied to a model."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ddf_convert.conversion.plan import Plan
from ddf_convert.conversion.planner import plan as make_plan
from ddf_convert.conversion.record import Conversion, recorded
from ddf_convert.conversion.rewriter import apply_replacements, replacements_of
from ddf_convert.conversion.tracer import build_graph
from ddf_convert.errors import UsageError
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.fake_copy import trainable_copy
from ddf_convert.utils.modules import bare, model_name


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

    The model keeps its class, its methods and the names of its other parameters: modules are swapped in the tree. Only
    where a functional convolution is replaced (``functional=True``) does a torch.fx GraphModule replace the model; in
    it, ``self.training`` has the value that it has now wherever the forward pass reads it. New layers take the device,
    dtype, training mode and plain attributes of the module that they replace, and are trainable even where that was
    frozen. Their weights are drawn from torch's CPU generator, whose state is left as it was. The record of what was
    done is ``model.ddf_conversion``.

    Args:
        model: The model that the plan was made for.
        plan: What to do; None makes a plan from ``example_input`` and the options.
        example_input: As for :func:`plan`; only without a plan.
        inplace: Change the model itself instead of a copy.
        as_graph: Return the converted model's torch.fx GraphModule, with the DDF layers as nodes.
        **options: As for :func:`plan`; only without a plan.

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
    if inplace and plan.functional:
        raise UsageError(
            "convolutions that are called as functions cannot be replaced in place: the model becomes a GraphModule;"
            " leave inplace out, or skip them in the plan"
        )
    inner = bare(model)
    replacements = replacements_of(plan, inner)
    before = recorded(inner)
    conversion = Conversion(
        source=before.source if before else model_name(inner),
        replaced=(*(before.replaced if before else ()), *replacements),
        configs=(*(before.configs if before else ()), plan.config),
    )
    if not inplace:
        model = _copy(model)
        inner = bare(model)
    converted = apply_replacements(inner, replacements)
    if as_graph and not isinstance(converted, fx.GraphModule):
        converted = build_graph(converted, model_name(inner))
    inner.ddf_conversion = converted.ddf_conversion = conversion  # type: ignore[assignment]
    if converted is inner:
        return model
    return type(model)(converted) if model is not inner else converted


def _copy(model: nn.Module) -> nn.Module:
    try:
        return trainable_copy(model)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be copied: {error}; convert it in place with inplace=True"
        ) from error
