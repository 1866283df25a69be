"""The filters that can take a convolution's place: DDF, its rivals in the paper's tables, and users' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from timm.layers.conv2d_same import create_conv2d_pad
from torch import nn

from ddf_convert.conversion.plan import ConvertConfig, Scalar
from ddf_convert.errors import DDFError, UsageError, suggestion
from ddf_convert.layers import (
    ChannelFilter2d,
    CondConv2d,
    DDF2d,
    DDFConv2d,
    DDFUp2d,
    DDFUpConv2d,
    DwCondConv2d,
    DwWeightNet2d,
    SeparableFilter2d,
    SpatialFilter2d,
)

DDF = "ddf"
DDF_LAYERS: dict[str, Callable[..., nn.Module]] = {
    layer.__name__: layer for layer in (DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d)
}
GROUP = "ddf_convert.filters"  # of entry points: packages that are installed can bring filters
CONFIGURABLE = ("heads", "se_ratio", "combine", "affine")  # fields of ConvertConfig that belong to a layer


@dataclass(frozen=True)
class Filter:
    """A kind of layer that can take a convolution's place.

    The layer is called with ``in_channels``, ``kernel_size``, ``stride``, ``padding`` (pixels, or "same" for
    TensorFlow's SAME), ``dilation``, ``padding_mode``, ``bias``, ``device`` and ``dtype``, what ``config`` and
    ``options`` name and, if it ``mixes``, ``out_channels`` and ``groups``. It turns (B, C, H, W) into what a
    convolution with the same arguments does; if it keeps the channels apart, a 1x1 convolution follows it wherever DDF
    would need one.

    Attributes:
        name: What ``--filter`` and manifests call it.
        layer: The class, or a function that returns a module.
        title: What tables call it; the name if empty.
        description: One line.
        config: Fields of ``ConvertConfig`` that the layer takes: any of "heads", "se_ratio", "combine", "affine".
        options: Arguments of its own and their defaults: ``filter_options`` changes them.
        mixes: It mixes channels and sets the output's width by itself.
        saves: Whether it is meant to save. If not, it replaces convolutions where it adds parameters and MACs too.
    """

    name: str
    layer: Callable[..., nn.Module]
    title: str = ""
    description: str = ""
    config: tuple[str, ...] = ()
    options: Mapping[str, Scalar] = field(default_factory=dict)
    mixes: bool = False
    saves: bool = True

    def __post_init__(self) -> None:
        if not self.name or self.name in DDF_LAYERS or any(each.isspace() for each in self.name):
            raise UsageError(f"a filter cannot be called {self.name!r}: give it a short name without spaces")
        unknown = set(self.config) - set(CONFIGURABLE)
        if unknown:
            raise UsageError(
                f"filter {self.name}: config names {', '.join(sorted(unknown))}, which is none of"
                f" {', '.join(CONFIGURABLE)}"
            )

    @property
    def words(self) -> str:
        """What tables call it."""
        return self.title or self.name

    def arguments(self, config: ConvertConfig) -> dict[str, Scalar]:
        """What a configuration comes to for the layer.

        Raises:
            UsageError: The configuration has options that this filter does not.
        """
        for name in CONFIGURABLE:
            if name not in self.config and getattr(config, name) != ConvertConfig.model_fields[name].default:
                raise UsageError(f"filter {self.name} has no {name}: leave it as it is by default")
        unknown = next((name for name in config.filter_options if name not in self.options), None)
        if unknown is not None:
            known = ", ".join(f"{name} ({value!r})" for name, value in self.options.items()) or "none"
            hint = suggestion(unknown, self.options) or ";"
            raise UsageError(f"filter {self.name} has no option {unknown!r}{hint} Its own are: {known}")
        own = {name: _like(name, default, config.filter_options.get(name)) for name, default in self.options.items()}
        # False is what every layer has for affine; manifests of older versions do not name it either.
        chosen = {name: getattr(config, name) for name in self.config if name != "affine" or config.affine}
        return {**chosen, **own}


def _like(name: str, default: Scalar, given: Scalar | None) -> Scalar:
    """A value given for an option, if it is of the default's type."""
    if given is None:
        return default
    if isinstance(default, float) and isinstance(given, int) and not isinstance(given, bool):
        return float(given)
    if type(given) is not type(default):
        raise UsageError(f"filter option {name} is {type(default).__name__}, such as {default!r}, and not {given!r}")
    return given


def depthwise(in_channels: int, kernel_size: int, **options: Any) -> nn.Module:
    """A depthwise convolution: torch's, or timm's where the padding depends on the input's size."""
    if options["padding"] == "same" and options.pop("padding_mode") != "zeros":
        raise ValueError("a SAME padding that depends on the input's size is one of zeros")
    module: nn.Module = create_conv2d_pad(
        in_channels, in_channels, kernel_size, groups=in_channels, **{"bias": False, **options}
    )
    return module


_filters = {
    each.name: each
    for each in (
        Filter(
            DDF,
            DDF2d,
            "DDF",
            "Decoupled dynamic filters: one for every pixel, and one for every channel of every image.",
            config=CONFIGURABLE,
            options={"nonlinearity": "relu"},
        ),
        Filter(
            "spatial",
            SpatialFilter2d,
            "spatial filter",
            "DDF's spatial filters alone: one for every pixel.",
            config=("heads", "affine"),
            options={"nonlinearity": "relu"},
        ),
        Filter(
            "channel",
            ChannelFilter2d,
            "channel filter",
            "DDF's channel filters alone: one for every channel of every image.",
            config=("se_ratio", "affine"),
            options={"nonlinearity": "relu"},
        ),
        Filter("depthwise", depthwise, "depthwise", "A depthwise convolution: nothing dynamic."),
        Filter(
            "condconv",
            CondConv2d,
            "CondConv",
            "A convolution mixed of several for every image: many more parameters.",
            options={"num_experts": 8},
            mixes=True,
            saves=False,
        ),
        Filter(
            "dw-condconv",
            DwCondConv2d,
            "DwCondConv",
            "CondConv of depthwise convolutions.",
            options={"num_experts": 8},
        ),
        Filter(
            "dw-weightnet",
            DwWeightNet2d,
            "DwWeightNet",
            "WeightNet of depthwise convolutions: a filter for every channel of every image.",
        ),
    )
}
_built_in = frozenset(_filters)


def register_filter(filter: Filter) -> Filter:
    """Makes a filter of one's own known to ``plan``, ``convert``, ``load`` and ``--filter``.

    Register it before a model that has it is loaded: nothing in a saved model is ever imported. A package can have it
    done for the command line too, by an entry point of the group ``ddf_convert.filters``, whose name is the filter's
    and whose object is the :class:`Filter`.

    Args:
        filter: The filter; it replaces one of the same name, unless that is built in.

    Returns:
        The filter.

    Raises:
        UsageError: The name is that of a built-in filter.
    """
    if filter.name in _built_in:
        raise UsageError(f"{filter.name} is a filter of ddf_convert itself: give yours another name")
    _filters[filter.name] = filter
    return filter


def list_filters() -> list[Filter]:
    """Every filter that is known, the built-in ones first; those of installed packages once they were used."""
    return list(_filters.values())


def find_filter(name: str) -> Filter:
    """The filter of that name: built in, registered, or brought by an installed package.

    Raises:
        UsageError: There is none.
        DDFError: The package that brings it cannot be imported.
    """
    if name not in _filters:
        for entry in entry_points(group=GROUP, name=name):
            try:
                found = entry.load()
            except Exception as error:
                raise DDFError(f"filter {name} of {entry.value} cannot be loaded: {error}") from error
            if not isinstance(found, Filter) or found.name != name:
                raise DDFError(f"filter {name}: {entry.value} is not a ddf_convert.Filter of that name")
            return register_filter(found)
        hint = suggestion(name, _filters)
        raise UsageError(
            f"no filter is called {name!r}{hint or ';'} Known: {', '.join(_filters)}. One of your own has to be"
            " registered first (ddf_convert.register_filter)"
        )
    return _filters[name]


def is_new(kind: str) -> bool:
    """Whether words for a layer (``build.kind_of``) are those of one that took a place, be it torch's own or not."""
    first = kind.split(" + ")[0]
    return first.startswith("DDF") or first in {each.words for each in _filters.values()}


def is_built_in(filter: Filter) -> bool:
    """Whether it is one of ddf_convert's own."""
    return filter.name in _built_in


def replacing_layers() -> tuple[type[nn.Module], ...]:
    """The classes of layers that take the places of convolutions and upsampling, and are looked at as a whole.

    Torch's own are not among them: a depthwise convolution is one wherever it stands.
    """
    chosen = [each.layer for each in _filters.values() if isinstance(each.layer, type)]
    own = [layer for layer in chosen if not layer.__module__.startswith("torch.")]
    return (DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d, SeparableFilter2d, *own)


def with_mixing(words: str, groups: int | None) -> str:
    """A layer in words, with the groups of the 1x1 convolution after it, if there is one."""
    return words if groups is None else f"{words} + 1x1" if groups == 1 else f"{words} + grouped 1x1"


def filter_of(module: nn.Module) -> Filter | None:
    """The filter whose layer a module is, if it is one's."""
    return next(
        (each for each in _filters.values() if isinstance(each.layer, type) and type(module) is each.layer), None
    )
