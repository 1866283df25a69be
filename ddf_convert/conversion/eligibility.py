"""Eligibility: whether a convolution can be replaced, with what options, and the new layer itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from ddf_convert.conversion.analysis import Candidate
from ddf_convert.conversion.config import ConvertConfig, Scalar
from ddf_convert.conversion.interpolate_hook import class_of
from ddf_convert.conversion.plan import FoundBy, Mix, Operation, Replacement
from ddf_convert.conversion.recorder import Call
from ddf_convert.conversion.registry import (
    DDF,
    DDF_LAYERS,
    LayerType,
    describe_mixing,
    find_layer_type,
    layer_type_of,
    replacing_layers,
)
from ddf_convert.layers import DDFConv2d, DDFUp2d, DDFUpConv2d, SeparableFilter2d
from ddf_convert.layers.branches import narrow_squeeze_width, squeeze_width
from ddf_convert.ops import DTYPES

# Forwards of convolutions that differ from Conv2d's only in the weights, and how the weights differ.
_KNOWN_FORWARDS = {
    nn.Conv2d.forward: "",
    Conv2dSame.forward: "",
    StdConv2d.forward: "standardises its weights",
    StdConv2dSame.forward: "standardises its weights",
    ScaledStdConv2d.forward: "standardises and scales its weights",
    ScaledStdConv2dSame.forward: "standardises and scales its weights",
}
_UPSAMPLERS = (nn.ConvTranspose2d, nn.Upsample, nn.PixelShuffle)
_TORCH_OPERATIONS = {
    nn.Conv2d: Operation.CONV,
    nn.ConvTranspose2d: Operation.CONV_TRANSPOSE,
    nn.Upsample: Operation.INTERPOLATE,
    nn.PixelShuffle: Operation.PIXEL_SHUFFLE,
}


class Refused(Exception):  # noqa: N818 - not an error: a reason
    """Why a site is not replaced; a second argument is the option that replaces it."""


# --- what a module is -------------------------------------------------------------------------------------------------


def operation_of(module: nn.Module) -> Operation:
    """Returns what a site's module computes; ``kind_of`` puts it in words."""
    if isinstance(module, DDFUp2d | DDFUpConv2d):
        return Operation.DDF_UP
    if isinstance(module, SeparableFilter2d):
        return operation_of(module.filter)
    if isinstance(module, DDFConv2d) or layer_type_of(module) is not None:
        return Operation.CONVERTED
    return next(
        (operation for kind, operation in _TORCH_OPERATIONS.items() if isinstance(module, kind)), Operation.CONVERTED
    )


def kind_of(module: nn.Module) -> str:
    """Describes a module: "dense 3x3", "transposed 4x4", "bilinear 2x", "pixel shuffle 2x", "DDF", "DDF + 1x1", ..."""
    if isinstance(module, DDFUp2d):
        return describe_ddf_up(module.scale_factor)
    if isinstance(module, DDFUpConv2d):
        return describe_ddf_up(module.up.scale_factor, mixes=True)
    if isinstance(module, DDFConv2d):
        return describe_mixing("DDF", module.mix.groups)
    if isinstance(module, SeparableFilter2d):
        return describe_mixing(kind_of(module.filter), module.mix.groups)
    if (layer_type := layer_type_of(module)) is not None:
        return layer_type.display_name
    if isinstance(module, nn.PixelShuffle):
        return f"pixel shuffle {module.upscale_factor}x"
    if isinstance(module, nn.Upsample):
        if module.scale_factor is None:
            size = module.size if isinstance(module.size, tuple) else (module.size,)
            return f"{module.mode} to {'x'.join(map(str, size))}"
        factors = module.scale_factor if isinstance(module.scale_factor, tuple) else (module.scale_factor,)
        return f"{module.mode} {' by '.join(f'{factor:.3g}x' for factor in dict.fromkeys(factors))}"
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return type(module).__name__  # from a function that is registered as a layer type
    size_of_kernel = "x".join(map(str, module.kernel_size))
    if isinstance(module, nn.ConvTranspose2d):
        return f"transposed {size_of_kernel}"
    if is_depthwise(module):
        return f"depthwise {size_of_kernel}"
    if module.groups > 1:
        return f"grouped {size_of_kernel}"
    return f"pointwise {size_of_kernel}" if module.kernel_size == (1, 1) else f"dense {size_of_kernel}"


def describe_ddf_up(factor: Scalar, mixes: bool = False) -> str:
    """Describes a DDF-Up layer, with the 1x1 convolution before it if there is one."""
    return f"DDF-Up {factor}x after 1x1" if mixes else f"DDF-Up {factor}x"


def in_words(replacement: Replacement) -> str:
    """Describes a replacement in the words of :func:`kind_of`."""
    return kind_of(build(replacement, device="meta"))


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether every input channel is a group of its own."""
    return conv.groups > 1 and conv.groups == conv.in_channels


# --- what can be replaced ---------------------------------------------------------------------------------------------


def obstacle(module: nn.Module, upsample: bool = False) -> str | None:
    """Says why nothing can replace a module, whatever the options; None if something can.

    Args:
        module: A convolution or, with ``upsample``, what upsamples.
        upsample: Whether upsampling is replaced too.
    """
    if isinstance(module, replacing_layers()):
        return f"already converted: {kind_of(module)}"
    if not upsample and isinstance(module, nn.ConvTranspose2d):
        return "transposed convolution; DDF replaces ordinary ones"
    if not isinstance(module, nn.Conv2d) and not (upsample and isinstance(module, _UPSAMPLERS)):
        return f"{type(module).__name__} is not a 2D convolution{' and does not upsample' if upsample else ''}"
    if parametrize.is_parametrized(module):
        return f"its {' and '.join(module.parametrizations)} is parametrised"  # type: ignore[arg-type]
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):  # the old weight_norm and spectral_norm, pruning
            return f"its weights are computed before each call ({type(hook).__name__})"
    if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "has hooks that would be lost"
    forwards = {*_KNOWN_FORWARDS, *(kind.forward for kind in _UPSAMPLERS)}
    if "forward" in vars(module) or class_of(module).forward not in forwards:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Upsample | nn.PixelShuffle):
        return None
    if module.weight.dtype not in DTYPES:
        return f"its weights are {module.weight.dtype}; DDF takes float32, float64, float16 or bfloat16"
    if parts := {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias", "gain"}:
        return f"holds {', '.join(sorted(parts))}, which would be lost"
    for option in ("stride", "padding", "dilation"):
        value = getattr(module, option)
        if not isinstance(value, str) and value[0] != value[1]:
            return f"{option} {value[0]}x{value[1]}; DDF has one {option} for both sides"
    return None


def check_convolution(candidate: Candidate, module: nn.Module, config: ConvertConfig, layer_type: LayerType) -> None:
    """Raises Refused where nothing can replace a convolution, whatever is selected."""
    if reason := obstacle(module):
        raise Refused(reason)
    assert isinstance(module, nn.Conv2d)
    if module.kernel_size not in [(size, size) for size in config.kernel_size]:
        listed = ", ".join(f"{size}x{size}" for size in config.kernel_size)
        raise Refused(f"{'x'.join(map(str, module.kernel_size))} kernel; {layer_type.display_name} replaces {listed}")
    if not candidate.calls:
        raise Refused("not called in the forward pass")
    check_weights(candidate)
    if candidate.module is None:
        _check_functional(candidate, config)
    if config.mixing == "never" and module.in_channels != module.out_channels and not layer_type.mixes:
        raise Refused(
            f"mixing is off, and {layer_type.display_name} alone cannot turn {module.in_channels} channels into"
            f" {module.out_channels}"
        )
    if module.in_channels % config.heads:
        raise Refused(f"{config.heads} heads do not divide its {module.in_channels} channels")


def check_weights(candidate: Candidate) -> None:
    """Raises Refused where something else uses a candidate's weights too."""
    if candidate.shared_with is not None:
        raise Refused(f"shares its weights with {candidate.shared_with}")
    if candidate.used_directly:
        raise Refused("the forward pass also reads its weights directly")


def _check_functional(candidate: Candidate, config: ConvertConfig) -> None:
    function = candidate.calls[0].function
    assert function is not None
    if function.computed:
        raise Refused("called as a function, with weights that the forward pass computes")
    if candidate.used_elsewhere:
        raise Refused("called as a function, with weights that the forward pass uses elsewhere too")
    if candidate.found_by is not FoundBy.FX:
        raise Refused("called as a function, out of torch.fx's sight")
    if not config.functional:
        raise Refused("called as a function: replacing it makes the model a GraphModule", "functional")


def needs_mixing(
    candidate: Candidate, conv: nn.Conv2d, config: ConvertConfig, layer_type: LayerType
) -> tuple[bool, str]:
    """Returns whether a 1x1 convolution follows the new layer, and why."""
    name = layer_type.display_name
    mixed = describe_mixing(name, conv.groups)
    if layer_type.mixes:
        return False, f"{name}: it mixes channels itself"
    if config.mixing == "never":
        return False, f"{name} alone: mixing is off"
    if config.mixing == "always":
        return True, f"{mixed}: mixing is always on"
    if conv.in_channels != conv.out_channels:
        return True, f"{mixed}: it turns {conv.in_channels} channels into {conv.out_channels}"
    if is_depthwise(conv):
        return False, f"{name} alone: a depthwise convolution mixes no channels either"
    if config.mixing == "dense":
        return True, f"{mixed}: it mixed channels itself"
    if candidate.bottleneck:
        return False, "bottleneck: 1x1 convolutions on both sides mix channels"
    if candidate.found_by is not FoundBy.FX:
        return True, f"{mixed}: nothing else is known to mix channels"
    return True, f"{mixed}: nothing else mixes channels"


def caution(conv: nn.Conv2d) -> str:
    """Says what of a convolution the new layer does not take over; empty if nothing."""
    special = _KNOWN_FORWARDS.get(type(conv).forward)
    return f"{type(conv).__name__} {special}, which its replacement does not" if special else ""


@torch.no_grad()
def effective_weight(conv: nn.Conv2d) -> Tensor:
    """Returns the weight that a convolution without :func:`obstacle` convolves with, (out, in / groups, K, K)."""
    if not _KNOWN_FORWARDS.get(type(conv).forward):
        return conv.weight.detach()
    gain = getattr(conv, "gain", None)
    scale = None if gain is None else (gain * conv.scale).view(-1)
    flat = conv.weight.detach().reshape(1, conv.out_channels, -1)
    standardized = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=cast(float, conv.eps))
    return standardized.reshape_as(conv.weight)


def stand_in(call: Call) -> nn.Conv2d | nn.ConvTranspose2d:
    """Makes the module that does what a functional convolution does, without weights.

    Raises:
        ValueError, RuntimeError, TypeError: There is none: the arguments are computed, or odd.
    """
    function = call.function
    assert function is not None
    first, second, *kernel_size = function.weight
    arguments: dict[str, Any] = {
        "kernel_size": tuple(kernel_size),
        **function.options,
        "bias": function.bias,
        "device": "meta",
        "dtype": function.dtype,
    }
    if function.transposed:
        return nn.ConvTranspose2d(first, second * function.options["groups"], **arguments)
    return nn.Conv2d(second * function.options["groups"], first, **arguments)


# --- what replaces it -------------------------------------------------------------------------------------------------


def replacement_for(conv: nn.Conv2d, config: ConvertConfig, mix: bool) -> Replacement:
    """Returns what replaces a convolution that has no :func:`obstacle`.

    Args:
        conv: The convolution.
        config: Options of the new layer.
        mix: Whether a 1x1 convolution follows.
    """
    layer_type = find_layer_type(config.filter)
    bias = conv.bias is not None
    options: dict[str, Scalar] = {"in_channels": conv.in_channels, **geometry(conv), **layer_type.arguments(config)}
    outputs: dict[str, Scalar] = {"out_channels": conv.out_channels, "groups": conv.groups}
    if layer_type.name == DDF:
        return Replacement(
            layer="DDFConv2d" if mix else "DDF2d", options={**options, "bias": bias, **(outputs if mix else {})}
        )
    if mix:
        behind = Mix(out_channels=conv.out_channels, groups=conv.groups, bias=bias)
        return Replacement(layer=layer_type.name, options={**options, "bias": False}, mix=behind)
    return Replacement(
        layer=layer_type.name, options={**options, "bias": bias, **(outputs if layer_type.mixes else {})}
    )


def geometry(conv: nn.Conv2d) -> dict[str, int | str]:
    """Returns kernel, stride, padding, dilation and padding mode as arguments of DDF2d."""
    dilation = conv.dilation[0]
    kernel_size = conv.kernel_size[0]
    padding: int | str
    if isinstance(conv, Conv2dSame) or getattr(conv, "same_pad", False):
        padding = "same"  # TensorFlow's, which depends on the input's size
    elif isinstance(conv.padding, str):
        padding = dilation * (kernel_size - 1) // 2 if conv.padding == "same" else 0
    else:
        padding = conv.padding[0]
    # Only Conv2d's own forward reads the mode.
    mode = conv.padding_mode if type(conv).forward is nn.Conv2d.forward else "zeros"
    return {
        "kernel_size": kernel_size,
        "stride": conv.stride[0],
        "padding": padding,
        "dilation": dilation,
        "padding_mode": mode,
    }


def kernel_for(kernel_size: int, stride: int, padding: int) -> int:
    """Returns K >= 3 of a DDF-Up layer whose windows hold all that outputs of a transposed convolution read."""
    reach = max((stride - 1 + padding) // stride, (kernel_size - 1 - padding) // stride)
    return max(2 * reach + 1, 3)


def with_narrow_squeeze(replacement: Replacement) -> Replacement:
    """Returns a replacement as manifests before format 5 meant it: its squeeze may be narrower than it would be now."""
    options = replacement.options
    if replacement.layer not in (*DDF_LAYERS, "channel") or "se_ratio" not in options:
        return replacement
    channels = int(options["out_channels" if replacement.layer == "DDFUpConv2d" else "in_channels"])
    width = narrow_squeeze_width(channels, float(options["se_ratio"]))
    if width == squeeze_width(channels, float(options["se_ratio"])):
        return replacement
    return replacement.model_copy(update={"options": {**options, "squeeze_channels": width}})


def build(replacement: Replacement, device: torch.device | str = "cpu") -> nn.Module:
    """Builds a new layer, in float32.

    Raises:
        ValueError: The options do not fit each other.
        TypeError: The layer has no such option.
        UsageError: No layer type of that name is known.
    """
    for flag in ("bias", "affine"):
        if not isinstance(replacement.options.get(flag, False), bool):
            raise ValueError(f"{flag} must be true or false, got {replacement.options[flag]!r}")
    where: dict[str, Any] = {"device": device, "dtype": torch.float32}
    layer = DDF_LAYERS.get(replacement.layer) or find_layer_type(replacement.layer).layer
    with _SkipInitialization() if torch.device(device).type == "meta" else nullcontext():
        built = layer(**replacement.options, **where)
        if replacement.mix is None:
            return built
        return SeparableFilter2d(built, int(replacement.options["in_channels"]), **dict(replacement.mix), **where)


class _SkipInitialization(TorchFunctionMode):
    """Skips the initialization of tensors on the meta device: it does nothing, and takes longer than all the rest."""

    _INITIALIZERS = frozenset(
        {
            *(getattr(nn.init, name) for name in nn.init.__all__ if name.endswith("_")),
            *(Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_),
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._INITIALIZERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
