"""The plan: what happens to every convolution of a model, and why. It is decided, read and edited before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ddf_convert.accounting import Cost


class ConvertConfig(BaseModel):
    """How convolutions are replaced, and which are left alone unless asked for.

    Attributes:
        se_ratio: Width of the channel branch's squeeze as a fraction of the channels (sigma in the paper).
        combine: "mul" (the paper) or "add" (the authors' second variant).
        heads: Groups of channels with a spatial filter of their own.
        mixing: Whether a 1x1 convolution that mixes channels follows the DDF layer: "auto" adds one unless 1x1
            convolutions stand on both sides (a bottleneck); "always"; "never" (sites that change the width are skipped).
        stem: Replace convolutions of few input channels too.
        depthwise: Replace depthwise convolutions too, though DDF adds parameters to them.
        allow_growth: Replace convolutions also where that adds parameters or MACs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    se_ratio: float = Field(default=0.2, gt=0)
    combine: Literal["mul", "add"] = "mul"
    heads: int = Field(default=1, ge=1)
    mixing: Literal["auto", "always", "never"] = "auto"
    stem: bool = False
    depthwise: bool = False
    allow_growth: bool = False


class Action(StrEnum):
    """What happens to a convolution."""

    REPLACE = "replace"
    SKIP = "skip"


class Replacement(BaseModel):
    """Everything needed to build what takes a convolution's place, so that loading never decides again.

    Attributes:
        layer: "DDF2d" (DDF alone) or "DDFConv2d" (DDF, then a 1x1 convolution).
        options: Keyword arguments of that class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Literal["DDF2d", "DDFConv2d"]
    options: dict[str, int | float | bool | str]


class Site(BaseModel):
    """One convolution of the model and the decision about it.

    Attributes:
        name: Path of the module, as in ``model.get_submodule``; for a functional call, the fx node's name.
        kind: "dense 3x3", "depthwise 3x3", "grouped 3x3", "pointwise 1x1", "dense 7x7", "functional", ...
        in_channels: C of the input.
        out_channels: C of the output.
        stride: Of the convolution, in pixels (rows, columns).
        input_shape: (B, C, H, W) at its first call.
        output_shape: (B, C, H, W) at its first call.
        calls: How often one forward pass calls it.
        action: Replace it or leave it alone.
        reason: Why, in words for a user.
        replacement: What takes its place, for every convolution that could be replaced (also while skipped).
        before: Cost of the convolution, over all its calls.
        after: Cost of what takes its place; equal to ``before`` while it is skipped.
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
    replacement: Replacement | None = None
    before: Cost
    after: Cost

    def skip(self, reason: str = "left alone by the plan's editor") -> None:
        """Leaves this convolution alone."""
        self.action, self.reason, self.after = Action.SKIP, reason, self.before


class Plan(BaseModel):
    """The decisions about every convolution of one model, in the order of its forward pass.

    Attributes:
        model: What was planned, in words: a timm name, or a class.
        input_size: (C, H, W) of the example input.
        config: The options that led to it.
        before: Cost of the whole model.
        sites: Every convolution.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    input_size: tuple[int, ...]
    config: ConvertConfig
    before: Cost
    sites: list[Site]

    @property
    def after(self) -> Cost:
        """Cost of the whole model once the plan is applied."""
        total = self.before
        for site in self.replaced:
            total = total - site.before + site.after
        return total

    @property
    def replaced(self) -> list[Site]:
        """The sites that will be replaced."""
        return [site for site in self.sites if site.action is Action.REPLACE]

    def __getitem__(self, name: str) -> Site:
        """The site of that name.

        Raises:
            KeyError: There is none; the message names near ones.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.sites)

    def names(self) -> Iterator[str]:
        """The names of the sites."""
        return (site.name for site in self.sites)
