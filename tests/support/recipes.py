"""A small classifier with every kind of 3x3 convolution, and its conversion: for tests of recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ddf_convert as ddf

# Options that replace every convolution.
EVERYTHING = {"stem": True, "depthwise": True, "allow_growth": True}


class Classifier(nn.Module):
    """A classifier with a stem, a dense convolution and a depthwise one."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, classes)

    def forward(self, image: Tensor) -> Tensor:
        feature = self.norm(self.stem(image)).relu()
        return self.head(self.deep(self.wide(feature).relu()).mean((2, 3)))


def converted_classifier(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The classifier, and a converted copy."""
    original = Classifier().eval()
    image = torch.randn(1, 3, 16, 16)
    return original, ddf.convert(original, example_input=image, affine=True, **{**EVERYTHING, **options})
