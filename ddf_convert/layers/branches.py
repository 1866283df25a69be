"""The two branches that predict the filters (paper, figure 2; the authors' state-dict names)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm

NARROWEST_SQUEEZE = 4


class SpatialBranch(nn.Sequential):
    """Predicts one K x K filter per head and pixel: a 1x1 convolution and FilterNorm.

    Args:
        in_channels: C of the input feature.
        kernel_size: K.
        heads: G.
        stride: Stride of the 1x1 convolution, in pixels.
        nonlinearity: Sets the base scale of the filters.
        affine: FilterNorm learns its scale and a shift.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        heads: int = 1,
        stride: int = 1,
        nonlinearity: str = "relu",
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, heads * kernel_size**2, 1, stride=stride, device=device, dtype=dtype),
            SpatialFilterNorm(kernel_size, nonlinearity, heads, affine, device=device, dtype=dtype),
        )

    @property
    def conv(self) -> nn.Conv2d:
        """The 1x1 convolution."""
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> SpatialFilterNorm:
        """FilterNorm."""
        return cast(SpatialFilterNorm, self[1])

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G*K*K, ceil(H / stride), ceil(W / stride))."""
        return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]


class ChannelBranch(nn.Sequential):
    """Predicts one K x K filter per image and channel: global pooling, squeeze, ReLU, expand and FilterNorm.

    Args:
        channels: C.
        kernel_size: K.
        se_ratio: Width of the squeeze as a fraction of C (sigma in the paper), and at least min(4, C).
        nonlinearity: Sets the base scale of the filters.
        affine: FilterNorm learns a shift besides its scale.
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        affine: bool = False,
        squeeze_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        squeezed = squeeze_width(channels, se_ratio) if squeeze_channels is None else squeeze_channels
        if squeezed < 1:
            raise ValueError(f"ChannelBranch: squeeze_channels must be 1 or more, got {squeezed}")
        # Layers of few channels had narrower squeezes in earlier versions; their weights can still be loaded.
        self._loadable_widths = (squeezed, narrow_squeeze_width(channels, se_ratio))
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels * kernel_size**2, 1, device=device, dtype=dtype),
            ChannelFilterNorm(channels, kernel_size, nonlinearity, affine, device=device, dtype=dtype),
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        weight = state_dict.get(f"{prefix}1.weight")
        if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[0] in self._loadable_widths:
            self._resize_squeeze(weight.shape[0])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _resize_squeeze(self, width: int) -> None:
        squeeze, expand = self.squeeze, self.expand
        if width == squeeze.out_channels:
            return
        assert squeeze.bias is not None
        squeeze.out_channels = expand.in_channels = width
        # The parameters stay the same objects, so that an optimizer still has them.
        squeeze.weight.data = squeeze.weight.data.new_empty(width, *squeeze.weight.shape[1:])
        squeeze.bias.data = squeeze.bias.data.new_empty(width)
        expand.weight.data = expand.weight.data.new_empty(expand.weight.shape[0], width, 1, 1)

    @property
    def squeeze(self) -> nn.Conv2d:
        """The 1x1 convolution to fewer channels."""
        return cast(nn.Conv2d, self[1])

    @property
    def expand(self) -> nn.Conv2d:
        """The 1x1 convolution to all taps of all channels."""
        return cast(nn.Conv2d, self[3])

    @property
    def norm(self) -> ChannelFilterNorm:
        """FilterNorm."""
        return cast(ChannelFilterNorm, self[4])

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, K, K)."""
        if not self.is_as_built():
            return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        squeeze, expand = self.squeeze, self.expand
        # On maps of one pixel a 1x1 convolution is a matrix product, which launches fewer kernels.
        pooled = input.mean((-2, -1))
        squeezed = F.relu(F.linear(pooled, squeeze.weight.flatten(1), squeeze.bias), inplace=True)
        return cast(Tensor, self.norm(F.linear(squeezed, expand.weight.flatten(1), expand.bias)))

    def is_as_built(self) -> bool:
        """Whether the children are those of the constructor, and have no hooks."""
        kinds = (nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, ChannelFilterNorm)
        if len(self) != len(kinds) or not all(map(has_default_forward, self, kinds)):
            return False
        pool, convolutions = cast(nn.AdaptiveAvgPool2d, self[0]), (self.squeeze, self.expand)
        return pool.output_size == 1 and all(
            convolution.kernel_size == (1, 1) and convolution.padding == (0, 0) and convolution.groups == 1
            for convolution in convolutions
        )


def squeeze_width(channels: int, se_ratio: float) -> int:
    """Returns the width of a squeeze: a fraction of the channels, and at least min(4, channels).

    One or two units before a ReLU are often 0 for every image at the start, and then never learn. The authors'
    checkpoints have no squeeze that is so narrow.
    """
    return max(int(channels * se_ratio), min(NARROWEST_SQUEEZE, channels))


def narrow_squeeze_width(channels: int, se_ratio: float) -> int:
    """Returns the width without that limit, as layers had it until manifests of format 5."""
    return max(1, int(channels * se_ratio))


def has_default_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs ``kind.forward`` and nothing else.

    It does not if the module is of another class (as torch's parametrizations make it), has a forward of its own, or
    if there are hooks: its own, or for all modules.
    """
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # vars(module) is more than torch.compile of torch 2.6 can follow
        and not any_global_hook()
    )


def any_global_hook() -> bool:
    """Whether a hook is registered for all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
