"""The plan: what happens to every convolution of a model, and why; read and edited before anything changes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ddf_convert.cost.count import Cost
from ddf_convert.errors import UsageError, in_one_line, suggestion

Scalar = int | float | bool | str  # what a layer's options are

_UPSAMPLING = ("nearest", "area", "linear", "bilinear", "bicubic", "trilinear", "pixel shuffle")  # kinds begin so
_MULTIPLES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _number(value: Any) -> Any:
    """A count as people write it, "2.5G", as a number; anything else as it is."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kKMmGgTt]?)\s*", value)
        if not found:
            raise ValueError(f"write a number such as 2.5G, 12M or 300k, not {value!r}")
        unit = found[2].upper().replace("K", "k")
        return round(float(found[1]) * _MULTIPLES.get(unit, 1))
    return round(value) if isinstance(value, float) and math.isfinite(value) else value


def _sizes(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _odd(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or any(size < 3 or size % 2 == 0 for size in sizes):
        raise ValueError("DDF has kernels of odd sizes from 3 on")
    return tuple(sorted(set(sizes)))


class ConvertConfig(BaseModel):
    """How convolutions are replaced, and which are left alone unless asked for.

    Attributes:
        filter: What takes a convolution's place: "ddf", a rival of it ("spatial", "channel", "depthwise", "condconv",
            "dw-condconv", "dw-weightnet"), or the name of a registered one (see ``register_filter``).
        filter_options: Options that the filter has beside those below, such as ``{"num_experts": 4}``.
        se_ratio: Width of the channel branch's squeeze as a fraction of the channels (sigma in the paper).
        combine: "mul" (the paper) or "add" (the authors' second variant).
        heads: Groups of channels with a spatial filter of their own.
        affine: Give both FilterNorms a learned scale and shift, so that recipes can start from the old weights.
        mixing: Whether a 1x1 convolution that mixes channels follows the new layer: "auto" adds one unless 1x1
            convolutions stand on both sides (a bottleneck); "dense" adds one there too, wherever the convolution mixed
            channels itself; "always", after depthwise ones too; "never" (what changes the width is skipped).
        stem: Replace convolutions of few input channels too.
        depthwise: Replace depthwise convolutions too, though DDF adds parameters to them.
        allow_growth: Replace convolutions also where that adds parameters or MACs.
        functional: Replace convolutions that are called as functions with weights of the model's own, too; the
            converted model is then a torch.fx GraphModule.
        upsample: Look at upsampling too, and replace it by DDF-Up: interpolations, which adds parameters and MACs,
            and, where that saves, transposed convolutions and pixel shuffles.
        kernel_size: Sizes K of the K x K convolutions to look at; one number or several.
        keep_first: Leave alone so many of the convolutions that would be replaced, the first ones of the forward pass.
        keep_last: The same for the last ones.
        target_macs: Replace no more convolutions than bring the model down to so many MACs; a number, or "2.5G".
        target_params: The same for parameters; "12M".
        only_faster: Time every convolution and what would take its place on this machine, and leave alone what would
            not get faster.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    filter: str = "ddf"
    filter_options: dict[str, Scalar] = {}
    se_ratio: float = Field(default=0.2, gt=0)
    combine: Literal["mul", "add"] = "mul"
    heads: int = Field(default=1, ge=1)
    affine: bool = False
    mixing: Literal["auto", "dense", "always", "never"] = "auto"
    stem: bool = False
    depthwise: bool = False
    allow_growth: bool = False
    functional: bool = False
    upsample: bool = False
    kernel_size: Annotated[tuple[int, ...], BeforeValidator(_sizes), AfterValidator(_odd)] = (3,)
    keep_first: int = Field(default=0, ge=0)
    keep_last: int = Field(default=0, ge=0)
    target_macs: Annotated[int, BeforeValidator(_number), Field(gt=0)] | None = None
    target_params: Annotated[int, BeforeValidator(_number), Field(gt=0)] | None = None
    only_faster: bool = False


class Action(StrEnum):
    """What happens to a convolution."""

    REPLACE = "replace"
    SKIP = "skip"


class FoundBy(StrEnum):
    """How a convolution was found: what is known of it is less from one to the next."""

    FX = "fx"  # in the torch.fx graph of the whole model
    PIECES = "fx, piecewise"  # in the graph of a part of the model
    HOOKS = "hooks"  # by running the model


class Operation(StrEnum):
    """What a site computes."""

    CONV = "conv2d"
    CONV_TRANSPOSE = "conv_transpose2d"
    INTERPOLATE = "interpolate"
    PIXEL_SHUFFLE = "pixel_shuffle"
    DDF_UP = "ddf_up"  # from an earlier conversion
    CONVERTED = "converted"  # another layer from an earlier conversion

    @property
    def upsamples(self) -> bool:
        """Whether it is an interpolation or a pixel shuffle; a transposed convolution is a convolution."""
        return self in (Operation.INTERPOLATE, Operation.PIXEL_SHUFFLE)


class Interpolation(BaseModel):
    """How an interpolation found its pixels, in the words of ``F.interpolate``.

    Attributes:
        mode: Of the interpolation.
        align_corners: Whether the centers of the corners' pixels, and not their corners, keep their places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["nearest", "nearest-exact", "area", "bilinear", "bicubic"]
    align_corners: bool = False


class Mix(BaseModel):
    """The 1x1 convolution after a filter that keeps channels apart.

    Attributes:
        out_channels: Of it.
        groups: Of it.
        bias: Whether it has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out_channels: int
    groups: int = 1
    bias: bool = False


class Replacement(BaseModel):
    """Everything needed to build what takes a convolution's place, so that loading never decides again.

    Attributes:
        layer: "DDF2d" (DDF alone), "DDFConv2d" (DDF, then a 1x1 convolution), "DDFUp2d" (DDF-Up) or "DDFUpConv2d" (a
            1x1 convolution, then DDF-Up); or the name of another filter.
        options: Keyword arguments of that class.
        mix: The 1x1 convolution behind another filter; None if there is none.
        interpolation: What it replaces, if that is an interpolation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    options: dict[str, Scalar]
    mix: Mix | None = None
    interpolation: Interpolation | None = None

    @property
    def is_ddf(self) -> bool:
        """Whether it is DDF or DDF-Up."""
        return self.layer in ("DDF2d", "DDFConv2d") or self.is_ddf_up

    @property
    def is_ddf_up(self) -> bool:
        """Whether it is DDF-Up."""
        return self.layer in ("DDFUp2d", "DDFUpConv2d")


class Site(BaseModel):
    """One convolution of the model, or one upsampling, and the decision about it.

    Attributes:
        name: Path of the module, as in ``model.get_submodule``; for a functional call, the path of the module whose
            forward makes it, and ``conv2d()`` or ``interpolate()``.
        kind: "dense 3x3", "depthwise 3x3", "grouped 3x3", "pointwise 1x1", "dense 7x7", "functional", ...; of
            upsampling, "bilinear 2x", "transposed 4x4", "pixel shuffle 2x", "functional nearest 2x", ...
        in_channels: C of the input.
        out_channels: C of the output.
        stride: Of the convolution, in pixels (rows, columns).
        input_shape: (B, C, H, W) at its first call.
        output_shape: (B, C, H, W) at its first call.
        calls: How often one forward pass calls it.
        action: Replace it or leave it alone.
        reason: Why, in words for a user.
        operation: What it computes.
        kernel_size: Of a convolution, in pixels (rows, columns); None for anything else.
        override: The option that replaces it when it is True, "stem" for example; empty where none does.
        found_by: How it was found.
        caution: What is less certain for it, in words; empty where nothing is.
        replacement: What takes its place, for every convolution that could be replaced (also while skipped).
        convolution: Of a pixel shuffle, the name of the convolution that is replaced with it; its cost is then in
            ``before``.
        before: Cost of the convolution, over all its calls.
        after: Cost of what takes its place; equal to ``before`` while it is skipped.
        replacement_cost: What ``after`` is once replaced, wherever there is a replacement.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    name: str
    kind: str
    in_channels: int
    out_channels: int
    stride: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: int = 1
    action: Action
    reason: str
    operation: Operation = Field(default_factory=lambda fields: _operation_of_kind(fields["kind"]))
    kernel_size: tuple[int, int] | None = Field(default_factory=lambda fields: _kernel_size_of_kind(fields["kind"]))
    override: str = Field(default_factory=lambda fields: _override_of_reason(fields["reason"]))
    found_by: FoundBy = FoundBy.FX
    caution: str = ""
    replacement: Replacement | None = None
    convolution: str = ""
    before: Cost
    after: Cost
    replacement_cost: Cost | None = None

    @property
    def upsampling(self) -> bool:
        """Whether it is an interpolation or a pixel shuffle; a transposed convolution is a convolution."""
        return self.operation.upsamples

    @property
    def functional(self) -> bool:
        """Whether it is a call of a function, such as ``F.conv2d``, and no module."""
        return self.name.endswith("()")

    def skip(self, reason: str = "left alone by the plan's editor", override: str = "") -> None:
        """Leaves this convolution alone; ``override`` is the option that would replace it."""
        self.action, self.after = Action.SKIP, self.before
        self.reason, self.override = f"{reason}{override_hint(override)}", override

    def replace(self, reason: str = "replaced by the plan's editor") -> None:
        """Replaces this convolution after all: undoes :meth:`skip`, or overrules the planner.

        Raises:
            UsageError: Nothing can take its place; the planner's reason stands.
        """
        if self.replacement is None or self.replacement_cost is None:
            raise UsageError(f"{self.name} cannot be replaced: {self.reason}")
        self.action, self.reason, self.override = Action.REPLACE, reason, ""
        self.after = self.replacement_cost


class Timed(BaseModel):
    """What a plan's times belong to.

    Attributes:
        machine: What they were measured on, in words.
        replaced: The names of the sites that were replaced when the converted model was timed.
        after_ms: Milliseconds of one forward pass of it; None if nothing was replaced or it was not timed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    replaced: tuple[str, ...]
    after_ms: float | None


class Plan(BaseModel):
    """The decisions about every convolution of one model, in the order of its forward pass.

    Attributes:
        model: What was planned, in words: a timm name, or a class.
        input_size: (C, H, W) of the example input.
        config: The options that led to it.
        before: Cost of the whole model.
        sites: Every convolution.
        notes: What there is to say of the plan as a whole: what could not be traced or reached.
        timed: What was timed, if anything was.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    input_size: tuple[int, ...]
    config: ConvertConfig
    before: Cost
    sites: list[Site]
    notes: list[str] = []
    timed: Timed | None = None

    @property
    def after(self) -> Cost:
        """Cost of the whole model once the plan is applied. Its activations are an estimate; so is its latency, where
        the plan is no longer as it was when it was timed (``timed_whole``).
        """
        total = self.before
        for site in self.replaced:
            total = total - site.before + site.after
        return (
            total.model_copy(update={"latency_ms": self.timed.after_ms}) if self.timed_whole and self.timed else total
        )

    @property
    def functional(self) -> bool:
        """Whether convolutions that are called as functions are replaced, so that the model becomes a GraphModule."""
        return any(site.functional and not site.upsampling for site in self.replaced)

    @property
    def timed_whole(self) -> bool:
        """Whether the converted model was timed as the plan stands now."""
        timed = self.timed
        return bool(timed and timed.after_ms and timed.replaced == tuple(site.name for site in self.replaced))

    @property
    def machine(self) -> str | None:
        """What the times among the costs were measured on; None where there are none."""
        return self.timed.machine if self.timed else None

    @property
    def replaced(self) -> list[Site]:
        """The sites that will be replaced."""
        return [site for site in self.sites if site.action is Action.REPLACE]

    def __getitem__(self, name: str) -> Site:
        """The site of that name.

        Raises:
            KeyError: There is none; the message names near ones.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"the plan has no site {name!r}{suggestion(name, self.names())}")

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:  # type: ignore[override]
        """The sites, as ``len`` counts them (not the fields, as pydantic would)."""
        return iter(self.sites)

    def __str__(self) -> str:
        """A line for each site and one for the model; the report package prints better ones."""
        lines = [f"{site.name}: {site.kind}: {site.action}: {site.reason}" for site in self.sites]
        before, after = self.before, self.after
        lines.append(
            f"{self.model}: {before.params:,} -> {after.params:,} parameters, {before.macs:,} -> {after.macs:,} MACs"
        )
        return "\n".join(lines)

    def names(self) -> Iterator[str]:
        """The names of the sites."""
        return (site.name for site in self.sites)

    def to_json(self) -> str:
        """The plan as JSON text, for :meth:`from_json`."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Reads a plan back.

        Raises:
            UsageError: The text is not the JSON of a plan.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"not a plan of ddf_convert: {in_one_line(error)}") from error


def override_hint(option: str) -> str:
    """How a reason ends that one option overrides; empty for no option."""
    return f" ({option}=True replaces it)" if option else ""


# --- plans saved before sites had these fields ---


def _operation_of_kind(kind: str) -> Operation:
    words = kind.removeprefix("functional ")
    if words.startswith("DDF-Up"):
        return Operation.DDF_UP
    if words.startswith("pixel shuffle"):
        return Operation.PIXEL_SHUFFLE
    if words.startswith(_UPSAMPLING):
        return Operation.INTERPOLATE
    if words.startswith("transposed"):
        return Operation.CONV_TRANSPOSE
    if words.startswith(("dense", "depthwise", "grouped", "pointwise", "functional")):
        return Operation.CONV
    return Operation.CONVERTED


def _kernel_size_of_kind(kind: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(?:functional )?(?:dense|depthwise|grouped|pointwise|transposed) (\d+)x(\d+)", kind)
    return (int(found[1]), int(found[2])) if found else None


def _override_of_reason(reason: str) -> str:
    found = re.search(r" \((\w+)=True replaces it\)$", reason)
    return found[1] if found else ""


def is_upsampling(kind: str) -> bool:
    """Whether a site's kind is that of an interpolation or a pixel shuffle."""
    return kind.removeprefix("functional ").startswith(_UPSAMPLING)


def make_config(config: ConvertConfig | None, options: dict[str, Any]) -> ConvertConfig:
    """The configuration with single options changed.

    Raises:
        UsageError: There is no such option, or its value does not fit.
    """
    try:
        return ConvertConfig.model_validate({**(config or ConvertConfig()).model_dump(), **options})
    except ValidationError as error:
        unknown = [str(item["loc"][0]) for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = suggestion(unknown[0], ConvertConfig.model_fields) if unknown else ""
        raise UsageError(f"cannot convert with these options: {in_one_line(error)}{hint}") from error
