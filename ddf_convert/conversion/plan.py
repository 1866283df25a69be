"""The plan: what happens to every convolution of a model, and why. It can be read and edited before it is applied."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddf_convert.conversion.config import ConvertConfig, Scalar
from ddf_convert.cost.count import Cost
from ddf_convert.errors import UsageError, in_one_line, suggestion

_UPSAMPLING = ("nearest", "area", "linear", "bilinear", "bicubic", "trilinear", "pixel shuffle")  # kinds begin so


class Action(StrEnum):
    """What happens to a convolution."""

    REPLACE = "replace"
    SKIP = "skip"


class FoundBy(StrEnum):
    """How a convolution was found, the best known first."""

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
    """The arguments of the ``F.interpolate`` that a layer replaces."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["nearest", "nearest-exact", "area", "bilinear", "bicubic"]
    align_corners: bool = False


class Mix(BaseModel):
    """The 1x1 convolution after a layer that keeps channels apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out_channels: int
    groups: int = 1
    bias: bool = False


class Replacement(BaseModel):
    """Everything needed to build the layer that replaces a convolution, so that loading never decides again.

    Attributes:
        layer: "DDF2d" (DDF alone), "DDFConv2d" (DDF, then a 1x1 convolution), "DDFUp2d" (DDF-Up) or "DDFUpConv2d" (a
            1x1 convolution, then DDF-Up); or the name of another layer type.
        options: Keyword arguments of that class.
        mix: The 1x1 convolution after another layer type's layer; None if there is none.
        interpolation: The arguments of the interpolation that it replaces, if it does.
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
        kind: For people: "dense 3x3", "depthwise 3x3", "pointwise 1x1", "bilinear 2x", "transposed 4x4", "pixel shuffle
            2x", "DDF + 1x1", ...; for a functional call, "functional dense 3x3".
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the convolution, in pixels (rows, columns).
        input_shape: (B, C, H, W) at the first call.
        output_shape: (B, C, H, W) at the first call.
        calls: How often one forward pass calls it.
        action: Replace it or leave it alone.
        reason: Why, for people.
        operation: What it computes.
        kernel_size: Kernel of the convolution, in pixels (rows, columns); None for anything else.
        override: The option that would replace it, such as "stem"; empty if there is none.
        found_by: How it was found.
        caution: What is less certain about it, for people; empty if nothing is.
        replacement: The layer to replace it with; None if nothing can. A skipped site has one too.
        convolution: For a pixel shuffle, the name of the convolution that is replaced with it, whose cost is then in
            ``before``.
        before: Cost over all calls.
        after: Cost of the replacement; equal to ``before`` while the site is skipped.
        replacement_cost: What ``after`` is once replaced; None without a replacement.
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
        """Leaves this site alone; ``override`` is the option that would replace it."""
        self.action, self.after = Action.SKIP, self.before
        self.reason, self.override = f"{reason}{override_hint(override)}", override

    def replace(self, reason: str = "replaced by the plan's editor") -> None:
        """Replaces this site after all: undoes :meth:`skip`, or overrules the planner.

        Raises:
            UsageError: Nothing can replace it; the message has the planner's reason.
        """
        if self.replacement is None or self.replacement_cost is None:
            raise UsageError(f"{self.name} cannot be replaced: {self.reason}")
        self.action, self.reason, self.override = Action.REPLACE, reason, ""
        self.after = self.replacement_cost


class Timed(BaseModel):
    """The conditions of a plan's times.

    Attributes:
        machine: The machine, in words.
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
        model: The model's timm name, or its class.
        input_size: (C, H, W) of the example input.
        config: The options that led to it.
        before: Cost of the whole model.
        sites: Every convolution, and every upsampling if ``config.upsample``.
        notes: Notes on the plan as a whole, such as what could not be traced or reached.
        timed: The conditions of the times; None if nothing was timed.
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
        """Cost of the whole model once the plan is applied.

        Its activations are an estimate; so is its latency, unless ``timed_whole``.
        """
        total = self.before
        for site in self.replaced:
            total = total - site.before + site.after
        if self.timed is None or not self.timed_whole:
            return total
        return total.model_copy(update={"latency_ms": self.timed.after_ms})

    @property
    def functional(self) -> bool:
        """Whether functional convolutions are replaced, so that the model becomes a GraphModule."""
        return any(site.functional and not site.upsampling for site in self.replaced)

    @property
    def timed_whole(self) -> bool:
        """Whether the converted model was timed with the current decisions."""
        timed = self.timed
        return bool(timed and timed.after_ms and timed.replaced == tuple(site.name for site in self.replaced))

    @property
    def machine(self) -> str | None:
        """The machine that the times were measured on; None if there are none."""
        return self.timed.machine if self.timed else None

    @property
    def replaced(self) -> list[Site]:
        """The sites that will be replaced."""
        return [site for site in self.sites if site.action is Action.REPLACE]

    def __getitem__(self, name: str) -> Site:
        """Returns the site of that name.

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
        """Iterates over the sites (not the fields, as pydantic would)."""
        return iter(self.sites)

    def __str__(self) -> str:
        """Returns a line for each site and one for the model."""
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
        """Returns the plan as JSON text, for :meth:`from_json`."""
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
    """Returns the end of a reason that an option overrides; empty for no option."""
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
