"""A network of the user's own, and the command line as a user's shell starts it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        print("the model talks while it is built")
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 64, 3, stride=2, padding=1)

    def forward(self, image):
        return self.body(self.stem(image).relu())

def fails():
    raise RuntimeError("first line\\nsecond line")

class Odd(Net):  # two inputs, and a convolution that is called as a function
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 64, 3, 3))

    def forward(self, image, mask):
        return {"feature": nn.functional.conv2d(super().forward(image), self.kernel) * mask}

def odd():
    return Odd(), {"image": torch.randn(1, 3, 20, 20), "mask": torch.rand(1, 1, 8, 8)}

number = 5
built = nn.Identity()
"""


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def start(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs it in a process of its own."""
    command = [sys.executable, "-m", "ddf_convert.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
