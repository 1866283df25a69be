"""Upsampling: what replaces interpolations, transposed convolutions and pixel shuffles, or why nothing does.

All of them are s*s fixed filters, one for each pixel of the s x s cell that an input pixel becomes; so is DDF-Up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from ddf_convert.conversion.analysis import Candidate
from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.eligibility import Refused, check_weights, geometry, kernel_for, obstacle
from ddf_convert.conversion.interpolate_hook import obstacle_to_intercepting
from ddf_convert.conversion.plan import Interpolation, Replacement
from ddf_convert.conversion.recorder import Call
from ddf_convert.ops import DTYPES

LARGEST = 8  # factor: s*s branches are the layer's parameters and its time
KERNELS = (3, 5)  # of DDF-Up
_MODES = get_args(Interpolation.model_fields["mode"].annotation)
_ALIGNED = (
    "align_corners=True: DDF-Up can start as interpolation with align_corners=False, up to half a pixel off, and not"
    " as this one"
)


def upsamples(candidate: Candidate) -> bool:
    """Whether a candidate upsamples; a transposed convolution does."""
    called = candidate.calls[0] if candidate.calls else None
    module = candidate.module
    if module is None and called is not None and called.function is not None:
        return called.function.transposed
    return isinstance(module, nn.Upsample | nn.PixelShuffle | nn.ConvTranspose2d) or bool(called and called.upsampled)


def stand_in_for_upsampling(call: Call) -> nn.Module:
    """Makes the module that does what a functional upsampling does."""
    upsampled = call.upsampled
    assert upsampled is not None
    sizes = call.output_shape[2:]
    factors = [after / before if before else 0.0 for before, after in zip(call.input_shape[2:], sizes, strict=False)]
    if upsampled.function == "pixel_shuffle":
        return nn.PixelShuffle(int(factors[0]))
    align = upsampled.align_corners if upsampled.align_corners else None
    if all(factor.is_integer() and factor for factor in factors):
        return nn.Upsample(
            scale_factor=factors[0] if len(set(factors)) == 1 else tuple(factors),
            mode=upsampled.mode,
            align_corners=align,
        )
    return nn.Upsample(size=sizes, mode=upsampled.mode, align_corners=align)


def replacement_for_upsampling(
    candidate: Candidate, module: nn.Module, config: ConvertConfig, others: Mapping[str, Candidate]
) -> tuple[Replacement, str]:
    """Returns what replaces an upsampling, and a caution or ""; raises Refused if nothing does.

    Args:
        candidate: The upsampling.
        module: Its module, or what stands in for it.
        config: Options of the new layer.
        others: The candidates of the model, by all their names.
    """
    if isinstance(module, nn.ConvTranspose2d):
        return _for_transposed(candidate, module, config), ""
    if isinstance(module, nn.PixelShuffle):
        return _for_shuffle(candidate, module, config, others), ""
    assert isinstance(module, nn.Upsample)
    return _for_interpolation(candidate, module, config)


def _for_interpolation(candidate: Candidate, module: nn.Upsample, config: ConvertConfig) -> tuple[Replacement, str]:
    _check_called(candidate, module)
    calls = candidate.calls
    upsampled = calls[0].upsampled
    if upsampled is None and module.size is not None:
        raise Refused("brings maps of any size to a fixed one")
    if upsampled is not None and upsampled.of_parameter:
        raise Refused("interpolates a parameter of the model, and no feature")
    mode = module.mode
    modes = {call.upsampled for call in calls}
    if len(modes) > 1:
        raise Refused("called with several modes of interpolation")
    factor = _factor(calls)
    if mode not in _MODES:
        raise Refused(f"{mode} interpolation; DDF-Up takes over {', '.join(_MODES)}")
    if upsampled is not None and upsampled.antialias and mode == "bicubic":
        raise Refused("torch's antialiased bicubic interpolation is another one, with other weights")
    channels = sorted({call.input_shape[1] for call in calls})
    if len(channels) > 1:
        raise Refused(f"called with {' and '.join(map(str, channels))} channels, and a layer takes one number of them")
    dtypes = {call.dtype for call in calls}
    if not dtypes <= set(DTYPES):
        raise Refused(f"works on {', '.join(map(str, dtypes))}; DDF takes float32, float64, float16 or bfloat16")
    if dtypes != {candidate.dtype}:
        raise Refused(f"works on {', '.join(map(str, dtypes))}, where the parameters around it are {candidate.dtype}")
    interpolation = Interpolation.model_validate({"mode": mode, "align_corners": bool(module.align_corners)})
    options = {
        **_up(channels[0], factor, 5 if mode == "bicubic" else 3, config),
        "in_channels": channels[0],
        "padding_mode": "replicate",
    }
    caution = _ALIGNED if interpolation.align_corners else ""
    return Replacement(layer="DDFUp2d", options=options, interpolation=interpolation), caution


def _for_transposed(candidate: Candidate, conv: nn.ConvTranspose2d, config: ConvertConfig) -> Replacement:
    if candidate.module is None:
        raise Refused("transposed convolution that is called as a function; only modules are replaced")
    _check_called(candidate, conv)
    check_weights(candidate)
    size, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    if conv.kernel_size[1] != size or conv.dilation[0] != 1:
        raise Refused("its kernel is dilated or not square")
    if stride == 1:
        raise Refused("its stride is 1: it does not upsample")
    first = candidate.calls[0]
    if any(_ratio(call) != (stride, stride) for call in candidate.calls):
        sizes = (f"{shape[-2]}x{shape[-1]}" for shape in (first.input_shape, first.output_shape))
        raise Refused(f"its output is not {stride} times its input: {' becomes '.join(sizes)}")
    _check_factor(stride)
    kernel = kernel_for(size, stride, padding)
    if kernel not in KERNELS:
        raise Refused(f"its outputs read {kernel}x{kernel} pixels of the input; DDF-Up takes up to 5x5")
    options = {**_up(conv.out_channels, stride, kernel, config), "in_channels": conv.in_channels}
    options["bias"] = conv.bias is not None
    if conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1:
        if any(call.arguments > 1 for call in candidate.calls):
            raise Refused("a depthwise one, and called with an output size")
        return Replacement(layer="DDFUp2d", options=options)
    options |= {"out_channels": conv.out_channels, "groups": conv.groups}
    return Replacement(layer="DDFUpConv2d", options=options)


def _for_shuffle(
    candidate: Candidate, shuffle: nn.PixelShuffle, config: ConvertConfig, others: Mapping[str, Candidate]
) -> Replacement:
    if candidate.module is None:
        raise Refused("called as a function; a pixel shuffle is replaced with its convolution, where it is a module")
    _check_called(candidate, shuffle)
    if len(candidate.calls) > 1:
        raise Refused(f"called {len(candidate.calls)} times, and replaced with one convolution only")
    factor = shuffle.upscale_factor
    if factor == 1:
        raise Refused("its factor is 1: it does not upsample")
    _check_factor(factor)
    source = others.get(candidate.fed_by)
    if source is None or not isinstance(source.module, nn.Conv2d):
        raise Refused("is not known to read one convolution's output, as its only reader")
    conv, name = source.module, source.name
    try:
        reason = obstacle(conv)
        if reason:
            raise Refused(reason)
        check_weights(source)
    except Refused as reason:
        raise Refused(f"its convolution, {name}, cannot be replaced: {reason}") from None
    if len(source.calls) > 1:
        raise Refused(f"its convolution, {name}, is called {len(source.calls)} times")
    size, shape = conv.kernel_size[0], geometry(conv)
    plain = shape["stride"] == shape["dilation"] == 1 and shape["padding_mode"] == "zeros"
    if conv.kernel_size not in [(kernel, kernel) for kernel in KERNELS]:
        sizes = "x".join(map(str, conv.kernel_size))
        raise Refused(f"its convolution, {name}, is {sizes}; before a pixel shuffle 3x3 and 5x5 are replaced")
    if not plain or shape["padding"] not in ("same", size // 2):
        raise Refused(f"its convolution, {name}, has a stride, a dilation, or padding that changes the size")
    channels = conv.out_channels // factor**2
    if channels % conv.groups:
        raise Refused(f"{conv.groups} groups of its convolution, {name}, do not divide {channels} channels")
    options = {**_up(channels, factor, size, config), "in_channels": conv.in_channels}
    options |= {"bias": conv.bias is not None, "out_channels": channels, "groups": conv.groups}
    return Replacement(layer="DDFUpConv2d", options=options)


def _up(channels: int, factor: int, kernel_size: int, config: ConvertConfig) -> dict[str, Any]:
    """Options of a DDF-Up layer with that many channels."""
    if channels % config.heads:
        raise Refused(f"{config.heads} heads do not divide its {channels} channels")
    return {
        "scale_factor": factor,
        "kernel_size": kernel_size,
        "heads": config.heads,
        "se_ratio": config.se_ratio,
        "combine": config.combine,
        "nonlinearity": "linear",
        **({"affine": True} if config.affine else {}),
    }


def _check_called(candidate: Candidate, module: nn.Module) -> None:
    reason = obstacle(module, upsample=True)
    if reason is None and candidate.owner is not None:
        reason = obstacle_to_intercepting(candidate.owner)
    if reason:
        raise Refused(reason)
    if not candidate.calls:
        raise Refused("not called in the forward pass")


def _ratio(call: Call) -> tuple[float, ...]:
    return tuple(after / before for before, after in zip(call.input_shape[-2:], call.output_shape[-2:], strict=True))


def _factor(calls: tuple[Call, ...]) -> int:
    """The one whole number of times that every call enlarges both sides."""
    found: list[int] = []
    for call in calls:
        before, after = call.input_shape[2:], call.output_shape[2:]
        if len(before) != 2:
            raise Refused(f"its input has {len(call.input_shape)} dimensions; DDF-Up takes maps (B, C, H, W)")
        if 0 in (*call.input_shape, *after):
            raise Refused("its maps are empty")
        if before == (1, 1):
            raise Refused("spreads a single pixel over the map")
        sizes = " becomes ".join("x".join(map(str, size)) for size in (before, after))
        if before == after:
            raise Refused(f"the size stays {'x'.join(map(str, before))}")
        if any(new < old for old, new in zip(before, after, strict=True)):
            raise Refused(f"makes maps smaller: {sizes}")
        rows, columns = _ratio(call)
        if rows != columns or not rows.is_integer():
            raise Refused(f"{sizes}: DDF-Up enlarges both sides by one whole number")
        found.append(int(rows))
    if len(set(found)) > 1:
        raise Refused(f"called with factors {' and '.join(map(str, sorted(set(found))))}")
    _check_factor(found[0])
    return found[0]


def _check_factor(factor: int) -> None:
    if factor > LARGEST:
        raise Refused(
            f"{factor}x would take {factor**2} branches of filters; DDF-Up goes up to {LARGEST}x: stack several"
        )
