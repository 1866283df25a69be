"""Planning: what becomes of every convolution of a model, and why, before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ddf_convert.accounting import Cost, count_parameters, measure
from ddf_convert.graph.build import build, is_depthwise, kind_of, obstacle, replacement_for
from ddf_convert.graph.plan import Action, ConvertConfig, Plan, Site, make_config
from ddf_convert.graph.select import Patterns, Selector
from ddf_convert.graph.sites import Convolution, find_convolutions
from ddf_convert.graph.trace import ExampleInput, as_inputs, describe, trace
from ddf_convert.layers import DDFConv2d

Filter = Callable[[str, nn.Module], bool]

STEM_CHANNELS = 4  # a convolution of so few input channels reads the image


def plan(
    model: nn.Module,
    example_input: ExampleInput,
    config: ConvertConfig | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: Filter | None = None,
    **options: Any,
) -> Plan:
    """Decides what becomes of every convolution of a model; the model stays as it is.

    Args:
        model: Any module that torch.fx can trace, on any device (the meta device too: weights are never read).
        example_input: (B, C, H, W), or a tuple of arguments for forward; only its shape matters.
        config: How to convert.
        include: Names, globs or ``re:`` patterns of the convolutions to look at; None for all.
        exclude: The same for those to leave alone; it wins over ``include``.
        filter_fn: Called with the name and the module of each that could be replaced; False leaves it alone.
        **options: Single fields of the config, e.g. ``se_ratio=0.5``.

    Returns:
        A decision and a reason for every 2D convolution. It can be edited, and is applied by ``convert``.

    Raises:
        UsageError: The model cannot be traced or does not accept the input, a pattern matches nothing, or an option
            is wrong.
    """
    config = make_config(config, options)
    traced = trace(model, example_input)
    convolutions = find_convolutions(model, traced)
    planner = _Planner(
        config, Selector("include", include, convolutions), Selector("exclude", exclude, convolutions), filter_fn
    )
    sites = [planner.decide(convolution) for convolution in convolutions]
    inputs = as_inputs(example_input)
    first = next((tuple(value.shape[1:]) for value in inputs if isinstance(value, torch.Tensor)), ())
    return Plan(model=describe(model), input_size=first, config=config, before=measure(model, *inputs), sites=sites)


class _Planner:
    """The table of decisions, row by row."""

    def __init__(self, config: ConvertConfig, include: Selector, exclude: Selector, filter_fn: Filter | None) -> None:
        self.config = config
        self.include = include
        self.exclude = exclude
        self.filter_fn = filter_fn
        self.costs = _Costs()

    def decide(self, convolution: Convolution) -> Site:
        if convolution.module is None:
            return _functional(convolution)
        site = self._undecided(convolution, convolution.module)
        site.reason = self._structure(convolution, convolution.module) or ""
        if site.reason or not isinstance(convolution.module, nn.Conv2d):
            return site
        conv = convolution.module
        mix, why = self._mixing(convolution, conv)
        site.replacement = replacement_for(conv, self.config, mix)
        layer = build(site.replacement, device="meta").to(conv.weight.dtype)
        site.replacement_cost = self.costs.over_all_calls(layer, convolution)
        refusal = self._unselected(convolution, conv) or self._unprofitable(site, conv)
        if refusal:
            site.reason = refusal
        else:
            site.replace(why)
        return site

    def _undecided(self, convolution: Convolution, module: nn.Module) -> Site:
        before = self.costs.over_all_calls(module, convolution)
        first = convolution.calls[0] if convolution.calls else None
        shown: Any = module
        stride = shown.ddf.stride if isinstance(module, DDFConv2d) else shown.stride
        return Site(
            name=convolution.name,
            kind=kind_of(module),
            in_channels=shown.in_channels,
            out_channels=shown.out_channels,
            stride=stride if isinstance(stride, tuple) else (stride, stride),
            input_shape=first.input_shape if first else (),
            output_shape=first.output_shape if first else (),
            calls=len(convolution.calls),
            action=Action.SKIP,
            reason="",
            before=before,
            after=before,
        )

    def _structure(self, convolution: Convolution, module: nn.Module) -> str | None:
        """What stands in the way whatever is selected."""
        reason = obstacle(module)
        if reason is not None or not isinstance(module, nn.Conv2d):
            return reason
        if not convolution.calls:
            return "not called in the forward pass"
        if convolution.enclosing is not None:
            return f"runs inside {convolution.enclosing}, which torch.fx does not look into"
        if convolution.shared_with is not None:
            return f"shares its weights with {convolution.shared_with}"
        if convolution.used_directly:
            return "the forward pass also reads its weights directly"
        if self.config.mixing == "never" and module.in_channels != module.out_channels:
            return f"mixing is off, and DDF alone cannot turn {module.in_channels} channels into {module.out_channels}"
        if module.in_channels % self.config.heads:
            return f"{self.config.heads} heads do not divide its {module.in_channels} channels"
        return None

    def _mixing(self, convolution: Convolution, conv: nn.Conv2d) -> tuple[bool, str]:
        """Whether a 1x1 convolution follows the DDF layer, and why."""
        one_by_one = "DDF + 1x1" if conv.groups == 1 else "DDF + grouped 1x1"
        if self.config.mixing == "never":
            return False, "DDF alone: mixing is off"
        if self.config.mixing == "always":
            return True, f"{one_by_one}: mixing is always on"
        if conv.in_channels != conv.out_channels:
            return True, f"{one_by_one}: it turns {conv.in_channels} channels into {conv.out_channels}"
        if is_depthwise(conv):
            return False, "DDF alone: a depthwise convolution mixes no channels either"
        if convolution.bottleneck:
            return False, "bottleneck: 1x1 convolutions on both sides mix channels"
        return True, f"{one_by_one}: nothing else mixes channels"

    def _unselected(self, convolution: Convolution, conv: nn.Conv2d) -> str | None:
        """Whether the user's selection leaves it out."""
        excluded = self.exclude.matching(convolution)
        if excluded is not None:
            return f"excluded by {excluded!r}"
        if self.include.patterns and self.include.matching(convolution) is None:
            return "outside include"
        if self.filter_fn is not None and not self.filter_fn(convolution.name, conv):
            return "filter_fn said no"
        return None

    def _unprofitable(self, site: Site, conv: nn.Conv2d) -> str | None:
        """What is left alone unless asked for."""
        cost = site.replacement_cost
        assert cost is not None
        params, macs = cost.params - site.before.params, cost.macs - site.before.macs
        if is_depthwise(conv):
            if self.config.depthwise:
                return None
            change = f"add {params:,} parameters to" if params > 0 else f"save {-params:,} parameters of"
            return f"DDF would {change} a depthwise convolution (depthwise=True replaces it)"
        if conv.in_channels <= STEM_CHANNELS and not self.config.stem:
            return f"stem: {conv.in_channels} input channels (stem=True replaces it)"
        if self.config.allow_growth or (params < 0 and macs < 0):
            return None
        grown = [
            f"{before:,} {what} would become {after:,}"
            for what, before, after in (
                ("parameters", site.before.params, cost.params),
                ("MACs", site.before.macs, cost.macs),
            )
            if after >= before
        ]
        return f"would not save: its {' and '.join(grown)} (allow_growth=True replaces it)"


def _functional(convolution: Convolution) -> Site:
    """A convolution called as a function: its cost follows from its arguments."""
    call = convolution.calls[0]
    node = call.node
    weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    weight = weight.meta["value"] if hasattr(weight, "meta") else weight
    stride: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    owned = [other.meta["value"] for other in node.all_input_nodes if other.op == "get_attr"]
    out_channels = call.output_shape[-3]
    spread = call.input_shape if node.target is torch.conv_transpose2d else call.output_shape
    before = Cost(
        params=sum(value.numel() for value in owned if isinstance(value, nn.Parameter)),
        macs=torch.Size(spread).numel() * weight[0].numel(),
        activation_bytes=torch.Size(call.input_shape).numel() * weight.element_size(),
    )
    return Site(
        name=convolution.name,
        kind="functional",
        in_channels=call.input_shape[-3],
        out_channels=out_channels,
        stride=(stride[0], stride[-1]) if isinstance(stride, tuple | list) else (stride, stride),
        input_shape=call.input_shape,
        output_shape=call.output_shape,
        calls=len(convolution.calls),
        action=Action.SKIP,
        reason="called as a function, has no module to swap",
        before=before,
        after=before,
    )


class _Costs:
    """Costs of layers over all the calls of a convolution. Equal layers, of which models have many, run once."""

    def __init__(self) -> None:
        self._measured: dict[tuple[Any, ...], Cost] = {}

    def over_all_calls(self, module: nn.Module, convolution: Convolution) -> Cost:
        """Parameters once; MACs and activations for each call, at its shape."""
        total = Cost(params=count_parameters(module))
        for call in convolution.calls:
            once = self._of_one_call(module, call.input_shape)
            total += Cost(macs=once.macs, activation_bytes=once.activation_bytes)
        return total

    def _of_one_call(self, module: nn.Module, shape: tuple[int, ...]) -> Cost:
        dtype = next(module.parameters()).dtype
        key = (type(module), repr(module), dtype, shape)  # the text shows every argument of these classes
        if key not in self._measured:
            self._measured[key] = measure(module, torch.empty(shape, dtype=dtype, device="meta"))
        return self._measured[key]
