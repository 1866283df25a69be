"""The layer types that can replace a convolution: DDF, the baselines of the paper's tables, and users' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from timm.layers.conv2d_same import create_conv2d_pad
from torch import nn

from ddf_convert.conversion.config import ConvertConfig, Scalar
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
ENTRY_POINT_GROUP = "ddf_convert.filters"
CONFIGURABLE = ("heads", "se_ratio", "combine", "affine")  # fields of ConvertConfig that belong to a layer


@dataclass(frozen=True)
class LayerType:
    """A kind of layer that can replace a convolution; ``ddf_convert.Filter`` is the same class.

    The layer turns (B, C, H, W) into what a convolution with the same arguments returns. It is called with
    ``in_channels``, ``kernel_size``, ``stride``, ``padding`` (pixels, or "same" for TensorFlow's SAME), ``dilation``,
    ``padding_mode``, ``bias``, ``device`` and ``dtype``, with what ``config`` and ``options`` name and, if it
    ``mixes``, with ``out_channels`` and ``groups``. If it does not mix, a 1x1 convolution follows it wherever one
    would follow DDF.

    Attributes:
        name: What ``--filter`` and manifests call it.
        layer: The class, or a function that returns a module.
        title: What tables call it; the name if empty.
        description: One line.
        config: Fields of ``ConvertConfig`` that the layer takes: any of "heads", "se_ratio", "combine", "affine".
        options: The layer's own arguments and their defaults; ``filter_options`` changes them.
        mixes: It mixes channels and sets the number of output channels itself.
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
    def display_name(self) -> str:
        """What tables call it."""
        return self.title or self.name

    def arguments(self, config: ConvertConfig) -> dict[str, Scalar]:
        """Returns the layer's arguments that a configuration sets.

        Raises:
            UsageError: The configuration has options that this layer type does not.
        """
        for name in CONFIGURABLE:
            if name not in self.config and getattr(config, name) != ConvertConfig.model_fields[name].default:
                raise UsageError(f"filter {self.name} has no {name}: leave it as it is by default")
        unknown = next((name for name in config.filter_options if name not in self.options), None)
        if unknown is not None:
            known = ", ".join(f"{name} ({value!r})" for name, value in self.options.items()) or "none"
            hint = suggestion(unknown, self.options) or ";"
            raise UsageError(f"filter {self.name} has no option {unknown!r}{hint} Its own are: {known}")
        own = {
            name: _convert_option(name, config.filter_options.get(name, default), default)
            for name, default in self.options.items()
        }
        # False is the default of every layer for affine, and manifests of older versions do not name it.
        configured = {name: getattr(config, name) for name in self.config if name != "affine" or config.affine}
        return {**configured, **own}


def _convert_option(name: str, value: Scalar, default: Scalar) -> Scalar:
    """Returns a value in the type of the option's default."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UsageError(f"filter option {name} is {type(default).__name__}, such as {default!r}, and not {value!r}")
    return value


def depthwise(in_channels: int, kernel_size: int, **options: Any) -> nn.Module:
    """Makes a depthwise convolution: torch's, or timm's where the padding depends on the input's size."""
    if options["padding"] == "same" and options.pop("padding_mode") != "zeros":
        raise ValueError("a SAME padding that depends on the input's size is one of zeros")
    module: nn.Module = create_conv2d_pad(
        in_channels, in_channels, kernel_size, groups=in_channels, **{"bias": False, **options}
    )
    return module


_layer_types = {
    each.name: each
    for each in (
        LayerType(
            DDF,
            DDF2d,
            "DDF",
            "Decoupled dynamic filters: one for every pixel, and one for every channel of every image.",
            config=CONFIGURABLE,
            options={"nonlinearity": "relu"},
        ),
        LayerType(
            "spatial",
            SpatialFilter2d,
            "spatial filter",
            "DDF's spatial filters alone: one for every pixel.",
            config=("heads", "affine"),
            options={"nonlinearity": "relu"},
        ),
        LayerType(
            "channel",
            ChannelFilter2d,
            "channel filter",
            "DDF's channel filters alone: one for every channel of every image.",
            config=("se_ratio", "affine"),
            options={"nonlinearity": "relu"},
        ),
        LayerType("depthwise", depthwise, "depthwise", "A depthwise convolution: nothing dynamic."),
        LayerType(
            "condconv",
            CondConv2d,
            "CondConv",
            "A convolution mixed of several for every image: many more parameters.",
            options={"num_experts": 8},
            mixes=True,
            saves=False,
        ),
        LayerType(
            "dw-condconv",
            DwCondConv2d,
            "DwCondConv",
            "CondConv of depthwise convolutions.",
            options={"num_experts": 8},
        ),
        LayerType(
            "dw-weightnet",
            DwWeightNet2d,
            "DwWeightNet",
            "WeightNet of depthwise convolutions: a filter for every channel of every image.",
        ),
    )
}
_built_in = frozenset(_layer_types)


def register_filter(filter: LayerType) -> LayerType:
    """Makes a layer type known to ``plan``, ``convert``, ``load`` and ``--filter``.

    Register it before loading a model that has it: nothing in a saved model is ever imported. An installed package can
    bring a layer type to the command line by an entry point of the group ``ddf_convert.filters``, whose name is the
    layer type's and whose object is the :class:`Filter`.

    Args:
        filter: The layer type; it replaces one of the same name, unless that is built in.

    Returns:
        The layer type.

    Raises:
        UsageError: The name is that of a built-in layer type.
    """
    if filter.name in _built_in:
        raise UsageError(f"{filter.name} is a filter of ddf_convert itself: give yours another name")
    _layer_types[filter.name] = filter
    return filter


def list_filters() -> list[LayerType]:
    """Lists every known layer type, the built-in ones first; those of installed packages once they were used."""
    return list(_layer_types.values())


def find_layer_type(name: str) -> LayerType:
    """Returns the layer type of that name: built in, registered, or brought by an installed package.

    Raises:
        UsageError: There is none.
        DDFError: The package that brings it cannot be imported.
    """
    if name in _layer_types:
        return _layer_types[name]
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            loaded = entry.load()
        except Exception as error:
            raise DDFError(f"filter {name} of {entry.value} cannot be loaded: {error}") from error
        if not isinstance(loaded, LayerType) or loaded.name != name:
            raise DDFError(f"filter {name}: {entry.value} is not a ddf_convert.Filter of that name")
        return register_filter(loaded)
    hint = suggestion(name, _layer_types)
    raise UsageError(
        f"no filter is called {name!r}{hint or ';'} Known: {', '.join(_layer_types)}. One of your own has to be"
        " registered first (ddf_convert.register_filter)"
    )


def is_built_in(layer_type: LayerType) -> bool:
    """Whether a layer type is one of ddf_convert's own."""
    return layer_type.name in _built_in


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Returns the layer type whose class a module is an instance of, if there is one."""
    return next((each for each in _layer_types.values() if type(module) is each.layer), None)


def replacing_layers() -> tuple[type[nn.Module], ...]:
    """Returns the classes of the layers that replace convolutions and upsampling and are never looked into.

    Torch's own are not among them: a depthwise convolution that replaced another is an ordinary one.
    """
    classes = [each.layer for each in _layer_types.values() if isinstance(each.layer, type)]
    own = [layer for layer in classes if not layer.__module__.startswith("torch.")]
    return (DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d, SeparableFilter2d, *own)


def describe_mixing(layer: str, groups: int | None) -> str:
    """Adds to a layer's words the 1x1 convolution that follows it, with its groups; None if none follows."""
    return layer if groups is None else f"{layer} + 1x1" if groups == 1 else f"{layer} + grouped 1x1"
