"""What tests/benchmarks/test_zoo.py has checked, in this process and in others."""

import os

from torch import nn

SIZE = {"input_size": (3, 16, 16)}


class Tiny(nn.Module):
    """A stem, one convolution that is worth replacing, and a depthwise one; returns a dictionary."""

    pretrained_cfg = SIZE

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.depthwise(self.body(self.stem(x).relu()).relu())
        return {"feature": x, "logits": self.head(x.mean((2, 3)))}


class Unbuilt(nn.Module):
    def __init__(self):
        raise RuntimeError("no such\nluck")


def crash():
    os._exit(3)
