"""Tables 2 to 5 of the paper, as they are printed there, with functions that build each row's model here.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021. Accuracies are top-1 on ImageNet, in percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from timm.layers import GatherExcite
from torch import nn

import ddf_convert as ddf

IMAGE = torch.empty(1, 3, 224, 224, device="meta")

# Table 2: milliseconds on an RTX 2080 Ti, batch 32, 256 channels, float32: Conv, DwConv, DDF module, DDF op.
TABLE_2 = {
    7: (0.21, 0.05, 0.93, 0.12),
    14: (0.40, 0.09, 0.96, 0.15),
    28: (2.31, 0.22, 1.29, 0.48),
    56: (4.09, 0.79, 2.60, 1.80),
    112: (16.04, 3.08, 9.07, 7.30),
    224: (82.57, 11.97, 37.11, 28.62),
}


@dataclass(frozen=True)
class PaperRow:
    """A row of table 3, 4 or 5.

    Attributes:
        group: The row's architecture, if the table has several.
        name: As in the paper.
        params: Millions, as printed; empty if the paper has none.
        macs: Billions, as printed ("FLOPs" there).
        top1: As printed; in table 3 with top-5. In brackets, retrained by the paper's authors.
        build: Builds the model to count; None if no library at hand has it.
        note: On the difference, or why there is nothing to count.
    """

    group: str
    name: str
    params: str
    macs: str
    top1: str
    build: Callable[[], nn.Module] | None
    note: str = ""


def converted(name: str, filter: str) -> nn.Module:
    """Returns a timm model that is converted as ``ddf-convert convert --filter`` does it."""
    return ddf.convert(timm.create_model(name), example_input=IMAGE, filter=filter)


def model(name: str, **options: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **options)


def resnet50(filter: str) -> Callable[[], nn.Module]:
    return partial(converted, "resnet50", filter)


def with_attention(name: str, layer: object) -> Callable[[], nn.Module]:
    return model(name, block_args={"attn_layer": layer})


TABLE_3 = (
    PaperRow("", "Base model", "", "", "77.2 / 93.5", model("resnet50")),
    PaperRow("", "Spatial", "", "", "74.4 / 92.0", resnet50("spatial")),
    PaperRow("", "Channel", "", "", "78.7 / 94.2", resnet50("channel")),
    PaperRow("", "Spatial and channel (DDF)", "", "", "79.1 / 94.5", resnet50("ddf")),
)

_NO_CODE = "no library at hand has it: quoted alone"
TABLE_4 = (
    PaperRow("R18", "Base model", "11.7", "1.8", "69.6", model("resnet18")),
    PaperRow("R18", "Adaptive", "11.1", "", "70.2", None, _NO_CODE),
    PaperRow("R18", "DyNet", "16.6", "0.6", "69.0", None, _NO_CODE),
    PaperRow(
        "R18", "DDF", "7.7", "0.4", "70.6", model("ddf_mul_resnet18"), "sigma 0.5, a 1x1 convolution after each DDF"
    ),
    PaperRow("R50", "Base model", "25.6", "4.1", "77.2", model("resnet50")),
    PaperRow("R50", "DyNet", "", "1.1", "76.3", None, _NO_CODE),
    PaperRow("R50", "CondConv", "104.8", "4.2", "78.6", resnet50("condconv"), "8 experts"),
    PaperRow("R50", "DwCondConv", "14.5", "2.3", "78.3", resnet50("dw-condconv"), "8 experts"),
    PaperRow("R50", "DwWeightNet", "14.4", "2.3", "78.0", resnet50("dw-weightnet")),
    PaperRow("R50", "DDF", "16.8", "2.3", "79.1", resnet50("ddf"), "sigma 0.2"),
)

_ATTENTION = "no library at hand has the variant: quoted alone"
_TIMM = "timm's"
_GE = (
    "our copy of the paper's table shows no figures; counted is timm's GatherExcite without parameters: its other"
    " variants cannot be built in timm 1.0.31"
)
_R50, _R101 = "ResNet-50", "ResNet-101"
TABLE_5 = (
    PaperRow(_R50, "ResNet50 (base)", "25.6", "4.1", "76.0 (77.2)", model("resnet50")),
    PaperRow(_R50, "SE-ResNet50", "28.1", "4.1", "77.6 (77.8)", model("seresnet50"), _TIMM),
    PaperRow(_R50, "BAM-ResNet50", "25.9", "4.2", "76.0", None, _ATTENTION),
    PaperRow(_R50, "CBAM-ResNet50", "28.1", "4.1", "77.3", with_attention("resnet50", "cbam"), _TIMM),
    PaperRow(_R50, "AA-ResNet50", "25.8", "4.2", "77.7", None, _ATTENTION),
    PaperRow(
        _R50,
        "ResNeXt50 (32x4d)",
        "25.0",
        "4.3",
        "77.8 (78.2)",
        model("resnext50_32x4d"),
        "timm's; 4.23 G, which the paper has as 4.3",
    ),
    PaperRow(
        _R50,
        "Res2Net50 (14w-8s)",
        "25.7",
        "4.2",
        "78.0",
        model("res2net50_14w_8s"),
        "timm's; 25.7 M is what its Res2Net-50 (26w-4s) has",
    ),
    PaperRow(_R50, "DDF-ResNet50", "16.8", "2.3", "79.1", model("ddf_mul_resnet50")),
    PaperRow(_R101, "ResNet101 (base)", "44.5", "7.8", "77.6 (78.9)", model("resnet101")),
    PaperRow(_R101, "GE-ResNet101", "", "", "", with_attention("resnet101", partial(GatherExcite, use_mlp=False)), _GE),
    PaperRow(_R101, "SE-ResNet101", "49.3", "7.8", "78.3 (79.3)", model("seresnet101"), _TIMM),
    PaperRow(_R101, "BAM-ResNet101", "44.9", "7.9", "77.6", None, _ATTENTION),
    PaperRow(_R101, "CBAM-ResNet101", "49.3", "7.8", "78.5", with_attention("resnet101", "cbam"), _TIMM),
    PaperRow(_R101, "AA-ResNet101", "45.4", "8.1", "78.7", None, _ATTENTION),
    PaperRow(
        _R101,
        "DDF-ResNet101",
        "28.1",
        "",
        "80.2",
        model("ddf_mul_resnet101"),
        "the paper's MACs are cut off in our copy",
    ),
)
