"""The VGG16 trunk of the edge detector HED as a plain module, with weights of a Keras file; and the edges behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.errors import UsageError

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN = (104.00699, 116.66877, 122.67892)  # blue, green, red: of Caffe, as these weights expect


class VGG16(nn.Module):
    """13 convolutions with ReLU; a 2x2 max-pool between blocks, none at the end (as in HED).

    Args:
        blocks: Channels of every convolution, block by block.
    """

    def __init__(self, blocks: Sequence[Sequence[int]] = BLOCKS) -> None:
        super().__init__()
        self.names: list[str] = []
        before = 3
        for block, widths in enumerate(blocks):
            for place, width in enumerate(widths):
                self.names.append(name_of(block, place))
                self.add_module(self.names[-1], nn.Conv2d(before, width, 3, padding=1))
                before = width
        self.ends = [name_of(block, len(widths) - 1) for block, widths in enumerate(blocks)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), BGR minus the mean, to the last map, (B, 512, H/16, W/16)."""
        for name in self.names:
            x = F.relu(self.get_submodule(name)(x))
            if name in self.ends[:-1]:
                x = F.max_pool2d(x, 2)
        return x


def name_of(block: int, place: int) -> str:
    """A convolution's name, as the literature counts: conv1_1, conv1_2, conv2_1, ..."""
    return f"conv{block + 1}_{place + 1}"


def keras_path(name: str) -> str:
    """Where a Keras 3 file has a convolution: conv2_1 is block2/layers/conv2d, conv2_2 block2/layers/conv2d_1, ..."""
    block, place = name.removeprefix("conv").split("_")
    return f"block{block}/layers/conv2d" + (f"_{int(place) - 1}" if int(place) > 1 else "") + "/vars"


def load_trunk(model: VGG16, file: Mapping[str, Any]) -> None:
    """Gives the trunk its weights.

    Args:
        model: The trunk.
        file: Arrays by path; a kernel is (K, K, in, out) there.
    """
    state = {}
    for name in model.names:
        state[f"{name}.weight"] = _tensor(file[f"{keras_path(name)}/0"]).permute(3, 2, 0, 1).contiguous()
        state[f"{name}.bias"] = _tensor(file[f"{keras_path(name)}/1"])
    model.load_state_dict(state)


class Edges:
    """HED's side outputs and what they are fused to: edge probabilities from the last map of every block.

    Args:
        file: Arrays by path.
    """

    def __init__(self, file: Mapping[str, Any]) -> None:
        self.sides = [
            (_tensor(file[f"dsn{block}/vars/0"]).permute(3, 2, 0, 1), _tensor(file[f"dsn{block}/vars/1"]))
            for block in range(1, len(BLOCKS) + 1)
        ]
        self.fuse = _tensor(file["fuse/vars/0"]).permute(3, 2, 0, 1), _tensor(file["fuse/vars/1"])

    def __call__(self, ends: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, ...) at the ends of the blocks, after ReLU, to probabilities (B, 1, H, W)."""
        size = ends[0].shape[-2:]
        sides = [
            F.interpolate(F.conv2d(end, *side), size, mode="bilinear", align_corners=False)
            for end, side in zip(ends, self.sides, strict=True)
        ]
        return F.conv2d(torch.cat(sides, 1), *self.fuse).sigmoid()


def open_weights(file: Path) -> tuple[VGG16, Edges]:
    """The trunk and what stands behind it, from the file.

    Raises:
        UsageError: h5py is missing.
    """
    try:
        import h5py
    except ImportError as error:
        raise UsageError("these weights are in HDF5, and h5py is missing: pip install h5py") from error
    trunk = VGG16().eval()
    with h5py.File(file) as opened:
        load_trunk(trunk, opened)
        return trunk.requires_grad_(True), Edges(opened)


def prepared(images: Tensor) -> Tensor:
    """Images in red, green and blue from 0 to 255 as the trunk expects them."""
    return images.flip(-3) - torch.tensor(MEAN).view(3, 1, 1)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float32))
