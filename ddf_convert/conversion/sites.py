"""Sites: the modules and calls of functions that can be replaced, and their names.

A module's name is its path. A call of a function is named after the module whose forward makes it: "neck.conv2d()", the
next one "neck.conv2d_1()". The layer that replaces it is at "neck.ddf_conv2d".
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.conversion.registry import replacing_layers

UPSAMPLING = (nn.Upsample, nn.PixelShuffle)  # sites with upsample=True
FUNCTIONS = {torch.conv2d: "conv2d", torch.conv_transpose2d: "conv_transpose2d"}  # F.conv2d is torch.conv2d
UPSAMPLING_FUNCTIONS = {F.interpolate: "interpolate", torch.pixel_shuffle: "pixel_shuffle"}
ARGUMENTS = {
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose2d: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    F.interpolate: ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
}
OPTIONS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # of convolutions, and their defaults


def site_kinds(upsample: bool = True) -> tuple[type[nn.Module], ...]:
    """Returns the classes of modules that are sites: convolutions, what replaced them and, with it, upsampling."""
    return (nn.Conv2d, nn.ConvTranspose2d, *replacing_layers(), *(UPSAMPLING if upsample else ()))


def is_site(module: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None) -> bool:
    """Whether a module is a site: one of these classes, and no upsampling that its author gave submodules."""
    return isinstance(module, kinds or site_kinds()) and not (isinstance(module, UPSAMPLING) and any(module.children()))


def site_modules(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Lists every site below the model with all its paths, in the order of registration."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    opaque = replacing_layers()
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or path.startswith(inside):
            continue
        if is_site(module, kinds):
            names.setdefault(id(module), (module, []))[1].append(path)
        if isinstance(module, opaque):
            inside = (*inside, f"{path}.")
    return [(module, tuple(paths)) for module, paths in names.values()]


def nearest_parameter(model: nn.Module, name: str) -> Tensor | None:
    """Returns the nearest parameter around a site that has none: a new layer takes its device and dtype."""
    path = name
    while path:
        path = owner_of(path)
        floating = [each for each in model.get_submodule(path).parameters() if each.is_floating_point()]
        if floating:
            return next((parameter for parameter in floating if parameter.requires_grad), floating[0])
    return None


# --- names ------------------------------------------------------------------------------------------------------------


def join_path(*parts: str) -> str:
    """Joins parts of a path; "" is the model itself."""
    return ".".join(filter(None, parts))


def owner_of(name: str) -> str:
    """Returns the path of the module that holds a module, or makes a call."""
    return name.rpartition(".")[0]


def call_name(owner: str, func: Any, called: Counter[str]) -> str:
    """Names a call of a function; ``called`` counts the calls in this run of the owner's forward, and is updated."""
    function = FUNCTIONS.get(func) or UPSAMPLING_FUNCTIONS[func]
    number = called[function]
    called[function] += 1
    return f"{join_path(owner, function)}{f'_{number}' if number else ''}()"


def is_interpolate_call(name: str) -> bool:
    """Whether a name is that of an ``F.interpolate`` call."""
    return name.endswith("()") and name.rpartition(".")[2].startswith("interpolate")


def layer_path(name: str) -> str:
    """Returns the path of the layer that replaces a call."""
    owner, _, call = name.removesuffix("()").rpartition(".")
    return join_path(owner, f"ddf_{call}")


def answers_interpolate(path: str) -> bool:
    """Whether a path is that of a layer that replaces an ``F.interpolate`` call."""
    return path.rpartition(".")[2].startswith("ddf_interpolate")
