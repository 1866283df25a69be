"""How convolutions are replaced: the options of ``plan`` and ``convert``."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ddf_convert.errors import UsageError, in_one_line, suggestion

Scalar = int | float | bool | str  # the value of a layer's option

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _parse_count(value: Any) -> Any:
    """Turns a count such as "2.5G" into a number, and returns anything else unchanged."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kKMmGgTt]?)\s*", value)
        if not found:
            raise ValueError(f"write a number such as 2.5G, 12M or 300k, not {value!r}")
        return round(float(found[1]) * _MULTIPLES[found[2].upper()])
    return round(value) if isinstance(value, float) and math.isfinite(value) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _check_odd(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or any(size < 3 or size % 2 == 0 for size in sizes):
        raise ValueError("DDF has kernels of odd sizes from 3 on")
    return tuple(sorted(set(sizes)))


class ConvertConfig(BaseModel):
    """Which convolutions are replaced, and by what."""

    # The docstrings of the fields are their descriptions, which the command line shows as the help of its options.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    filter: str = "ddf"
    """The layer type that replaces them: "ddf", a baseline ("spatial", "channel", "depthwise", "condconv",
    "dw-condconv", "dw-weightnet"), or a registered one (see ``register_filter``)."""
    filter_options: dict[str, Scalar] = {}
    """Further options of the layer type, such as ``num_experts`` of "condconv"."""
    se_ratio: float = Field(default=0.2, gt=0)
    """Width of the channel branch's squeeze as a fraction of the channels (sigma in the paper)."""
    combine: Literal["mul", "add"] = "mul"
    """How the two filters are combined: "mul" (the paper) or "add" (the authors' second variant)."""
    heads: int = Field(default=1, ge=1)
    """Groups of channels that have their own spatial filter."""
    affine: bool = False
    """Give both FilterNorms a learned scale and shift, so that recipes can start from the old weights."""
    mixing: Literal["auto", "dense", "always", "never"] = "auto"
    """Whether a 1x1 convolution that mixes channels follows the new layer. "auto" adds one unless 1x1 convolutions
    stand on both sides (a bottleneck). "dense" adds one there too, wherever the convolution mixed channels itself.
    "always" adds one after depthwise convolutions too. "never" adds none, and skips convolutions that change the number
    of channels."""
    stem: bool = False
    """Also replace convolutions that have few input channels."""
    depthwise: bool = False
    """Also replace depthwise convolutions, though DDF adds parameters to them."""
    allow_growth: bool = False
    """Also replace convolutions where that adds parameters or MACs."""
    functional: bool = False
    """Also replace convolutions that are called as functions with parameters of the model. The converted model is then
    a torch.fx GraphModule."""
    upsample: bool = False
    """Also replace upsampling by DDF-Up: interpolations, which adds parameters and MACs, and transposed convolutions
    and pixel shuffles where that saves."""
    kernel_size: Annotated[tuple[int, ...], BeforeValidator(_as_tuple), AfterValidator(_check_odd)] = (3,)
    """Sizes K of the K x K convolutions to consider; one number or several."""
    keep_first: int = Field(default=0, ge=0)
    """How many of the convolutions that would be replaced stay, from the start of the forward pass."""
    keep_last: int = Field(default=0, ge=0)
    """The same from its end."""
    target_macs: Annotated[int, BeforeValidator(_parse_count), Field(gt=0)] | None = None
    """Stop replacing when the model is down to this many MACs; a number, or "2.5G"."""
    target_params: Annotated[int, BeforeValidator(_parse_count), Field(gt=0)] | None = None
    """The same for parameters, such as "12M"."""
    only_faster: bool = False
    """Time every convolution and its replacement on this machine, and skip what would not get faster."""


def make_config(config: ConvertConfig | None, options: dict[str, Any]) -> ConvertConfig:
    """Returns a configuration with single options changed.

    Raises:
        UsageError: There is no such option, or its value does not fit.
    """
    try:
        return ConvertConfig.model_validate({**(config or ConvertConfig()).model_dump(), **options})
    except ValidationError as error:
        unknown = [str(item["loc"][0]) for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = suggestion(unknown[0], ConvertConfig.model_fields) if unknown else ""
        raise UsageError(f"cannot convert with these options: {in_one_line(error)}{hint}") from error
