"""Which operations keep every channel to itself: what may stand between a DDF layer and the 1x1 that mixes for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

# Modules of these files work on each channel by itself, or (normalisation) rescale channels without mixing them.
_FILES = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation",
        "batchnorm",
        "dropout",
        "instancenorm",
        "normalization",
        "padding",
        "pooling",
        "upsampling",
    )
) | frozenset(
    f"timm.layers.{name}"
    for name in (
        "activations",
        "activations_me",
        "blur_pool",
        "drop",
        "evo_norm",
        "fast_norm",
        "filter_response_norm",
        "layer_scale",
        "norm",
        "norm_act",
        "pool2d_same",
        "split_batchnorm",
    )
)

_NAMES = """
    adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu celu_ clamp clamp_ clamp_max
    clamp_min clone contiguous detach dropout dropout2d dropout_ elu elu_ feature_dropout float gelu group_norm half
    hardshrink hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate leaky_relu leaky_relu_ max_pool2d mean
    mish pad prelu relu relu6 relu_ rrelu selu selu_ sigmoid sigmoid_ silu softplus softsign tanh tanh_ to type type_as
    bfloat16 double upsample drop_path drop_block_2d drop_block_fast_2d
"""
_FUNCTIONS = frozenset(_NAMES.split())
# Functions that choose by a flag whether to return indices carry no name of their own.
_DISPATCHED: tuple[Callable[..., Any], ...] = (F.max_pool2d, F.adaptive_max_pool2d)

_MULTIPLICATIONS = frozenset({"mul", "mul_", "imul", "multiply", "multiply_"})


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module is known to keep channels apart: normalisation, activation, pooling, dropout, padding, ..."""
    if isinstance(module, nn.Identity):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return False
    return any(base.__module__ in _FILES for base in type(module).__mro__)


def function_name(node: fx.Node) -> str:
    """The name of what a call_function or call_method node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_channelwise_node(node: fx.Node) -> bool:
    """Whether a node is an operation of one feature that keeps its channels apart."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return is_channelwise(module)
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _DISPATCHED or function_name(node) in _FUNCTIONS


def is_multiplication(node: fx.Node) -> bool:
    """Whether a node multiplies elementwise."""
    return node.op in ("call_function", "call_method") and function_name(node) in _MULTIPLICATIONS
