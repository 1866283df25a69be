"""Upsamples one depth map, by a network or by interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.depth.lowres import fit
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.models.depth_holes import fill_holes
from ddf_convert.utils.modules import evaluating


def upsample(model: JointUpNet, photo: Tensor, depth: Tensor) -> tuple[Tensor, str | None]:
    """Upsamples a depth map with a network; sizes that its factor does not divide are padded, and cropped again.

    Args:
        model: On any device.
        photo: (3, H, W) uint8.
        depth: (1, h, w), holes 0; h and w are H and W over the network's factor, rounded up or down.

    Returns:
        (1, H, W) float32 on the CPU, above 0; and a note on the padding, or None.

    Raises:
        UsageError: The sizes do not fit.
    """
    device = next(model.parameters()).device
    padded, small, words = fit(photo, depth, model.scale_factor)
    with evaluating(model), torch.inference_mode():
        found = model(small[None].float().to(device), padded[None].float().to(device) / 255)[0].cpu()
    found = found[..., : photo.shape[-2], : photo.shape[-1]]
    # The residual is unbounded; nothing below half of the smallest measurement is credible.
    return found.clamp_min(0.5 * float(small[small > 0].min())), words


def interpolate(depth: Tensor, factor: int, size: Sequence[int], mode: str = "bicubic") -> Tensor:
    """Interpolates a depth map, (1, h, w) -> (1, H, W), after filling its holes.

    Args:
        depth: (1, h, w), holes 0.
        factor: s.
        size: H and W; what lies beyond s*h and s*w repeats the last row and column.
        mode: As for ``torch.nn.functional.interpolate``.
    """
    filled, _ = fill_holes(depth[None].float())
    large = F.interpolate(filled, scale_factor=factor, mode=mode)
    beyond = [max(0, wanted - have) for wanted, have in zip(size, large.shape[-2:], strict=True)]
    return F.pad(large, (0, beyond[1], 0, beyond[0]), mode="replicate")[0, :, : size[0], : size[1]]
