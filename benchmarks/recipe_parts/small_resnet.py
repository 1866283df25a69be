"""A ResNet small enough for digits on a CPU: BasicBlocks of dense 3x3 convolutions and batch norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-18.

    Args:
        before: Channels of the input.
        width: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem that halves the map, one block for each width, and a classifier.

    Args:
        widths: Channels; every block but the first halves the map.
        classes: Of the digits.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        before = [widths[0], *widths[:-1]]
        strides = [1, *[2] * (len(widths) - 1)]
        self.blocks = nn.Sequential(*map(BasicBlock, before, widths, strides))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, classes)."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((-2, -1)))
