"""DDF-ResNets in timm's registry: ``timm.create_model("ddf_mul_resnet50")``.

ddf_mul_* combine the two filters by multiplication (the paper's equation 1), ddf_add_* by addition. As in the paper's
tables, every 3x3 convolution of ResNet-18's stages becomes DDF (squeeze 0.5) and a 1x1 convolution. In the bottlenecks
of the deeper ones it becomes DDF (squeeze 0.2) alone, since their own 1x1 convolutions mix the channels.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 4.1. State-dict names are the authors'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.eligibility import replacement_for
from ddf_convert.conversion.record import AppliedReplacement, forget_origins
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.errors import UsageError

Combine = Literal["mul", "add"]


class _Architecture(NamedTuple):
    block: type[nn.Module]
    layers: tuple[int, int, int, int]
    se_ratio: float


_ARCHITECTURES = {
    18: _Architecture(BasicBlock, (2, 2, 2, 2), 0.5),
    50: _Architecture(Bottleneck, (3, 4, 6, 3), 0.2),
    101: _Architecture(Bottleneck, (3, 4, 23, 3), 0.2),
    152: _Architecture(Bottleneck, (3, 8, 36, 3), 0.2),
}
_COMBINATIONS: tuple[Combine, ...] = ("mul", "add")

_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}
_NAMES = [f"ddf_{combine}_resnet{depth}" for combine in _COMBINATIONS for depth in _ARCHITECTURES]

default_cfgs = generate_default_cfgs({name: dict(_CFG) for name in _NAMES})


def _with_ddf(combine: Combine, se_ratio: float, **arguments: Any) -> nn.Module:
    """Builds timm's ResNet with every 3x3 convolution of its stages replaced."""
    model: nn.Module = ResNet(**arguments)
    config = ConvertConfig(combine=combine, se_ratio=se_ratio)
    mix = arguments["block"] is BasicBlock
    replacements = [
        AppliedReplacement(names=(name,), replacement=replacement_for(module, config, mix))
        for name, module in model.named_modules()
        if name.startswith("layer") and isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    apply_replacements(model, replacements)
    forget_origins(model)  # timm builds it like this, so there is no conversion to record
    return model


def _entrypoint(combine: Combine, depth: int) -> Callable[..., nn.Module]:
    block, layers, se_ratio = _ARCHITECTURES[depth]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained and not (kwargs.get("pretrained_cfg") or kwargs.get("pretrained_cfg_overlay")):
            raise UsageError(f"{create.__name__} has no pretrained weights; use pretrained=False, and load your own")

        def build(**arguments: Any) -> nn.Module:
            return _with_ddf(combine, se_ratio, **arguments)

        arguments = {"block": block, "layers": layers, **kwargs}
        model: nn.Module = build_model_with_cfg(build, create.__name__, pretrained, **arguments)
        return model

    create.__name__ = create.__qualname__ = f"ddf_{combine}_resnet{depth}"
    create.__doc__ = f"DDF-ResNet-{depth}, filters combined by {combine}; arguments as for timm's resnet{depth}."
    return create


for _combine in _COMBINATIONS:
    for _depth in _ARCHITECTURES:
        _create = _entrypoint(_combine, _depth)
        globals()[_create.__name__] = register_model(_create)
