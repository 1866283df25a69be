"""DDF-Up-Net: upsamples a depth map under the guidance of a photo, by stacked DDF-Up layers.

Strided convolutions read the photo and leave a feature at every scale between the photo and the depth map. An encoder
reads the small depth map. The decoder doubles the result repeatedly: DDF-Up's filters are predicted from the photo's
feature of that scale, from the map that is doubled, and from color similarity.

The depth map is the first channel of all that is doubled. Filters start as those of bilinear interpolation, with a
preference for pixels of similar color, and all else that is added to the first channel starts at 0. So an untrained
network interpolates along the edges of the photo and learns corrections to that, for which few data are enough.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 4.2, for the form: an encoder, guidance
from the photo, a decoder of DDF-Up. Interpolation weighted by color similarity is joint bilateral upsampling (Kopf et
al., SIGGRAPH 2007). Widths, initialization and the treatment of holes are this project's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.layers import DDFUp2d, SpatialBranch
from ddf_convert.layers.branches import narrow_squeeze_width
from ddf_convert.models.depth_holes import fill_holes, moments

SCALE_FACTORS = (2, 4, 8, 16)
Sampling = Literal["nearest", "mean"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)
_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's photos, from 0 to 1
_TAPS = 9
_SIMILARITIES = 4 * _TAPS  # channels: each of four output pixels, with each of nine input pixels
_COLOR_SCALE = 0.2  # sum of the differences of three colors from 0 to 1 that makes a similarity of 1/e
_INITIAL_STD = 0.05  # of a filter's taps around interpolation's
_RANDOM_WEIGHTS = 0.1  # factor of random weights beside those with a meaning at the start


class JointUpNet(nn.Module):
    """Base of :class:`DDFUpNet` and :class:`JointConvUpNet`, which differ in the stage that doubles a feature.

    Args:
        scale_factor: s, one of 2, 4, 8 and 16.
        width: Channels of the features that are doubled, the depth map among them; 2 or more.
        guide_width: Channels of the photo's features.
        head_width: Channels at the photo's own scale.
        blocks: Residual blocks of the encoder.
        sampling: What a pixel of the small depth map is; see :class:`DDFUpNet`.
        make_stage: Builds a stage that starts as a linear interpolation with given filters, (4, 3, 3).

    Attributes:
        arguments: The constructor's arguments by name.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        scale_factor: int,
        width: int,
        guide_width: int,
        head_width: int,
        blocks: int,
        sampling: Sampling,
        make_stage: Callable[[Tensor], nn.Module],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {"width": width, "guide_width": guide_width, "head_width": head_width, "blocks": blocks}
        if scale_factor not in SCALE_FACTORS:
            raise ValueError(f"{name}: scale_factor must be one of 2, 4, 8 and 16, got {scale_factor}")
        for (argument, value), least in zip(sizes.items(), (2, 1, 1, 0), strict=True):
            if value < least:
                raise ValueError(f"{name}: {argument} must be {least} or more, got {value}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"{name}: sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        self.scale_factor = scale_factor
        self.sampling = sampling
        self.arguments: dict[str, Any] = {"scale_factor": scale_factor, **sizes, "sampling": sampling}
        stages = scale_factor.bit_length() - 1
        self.guidance = Guidance(stages, guide_width)
        self.encoder = nn.Sequential(_conv(2, width - 1), nn.ReLU())
        self.blocks = nn.ModuleList(Residual(width + guide_width, width) for _ in range(blocks))
        self.stages = nn.ModuleList(
            make_stage(interpolation_filters(sampling == "nearest" and index == stages - 1)) for index in range(stages)
        )
        self.mixers = nn.ModuleList(Residual(width + guide_width, width) for _ in range(stages - 1))
        self.photo = nn.Sequential(_conv(3, head_width), nn.ReLU())
        self.head = nn.Sequential(_conv(width + head_width, head_width), nn.ReLU(), _zero_init(_conv(head_width, 1)))
        self.register_buffer("rgb_mean", torch.tensor(_RGB_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("rgb_std", torch.tensor(_RGB_STD).view(3, 1, 1), persistent=False)

    def forward(self, depth: Tensor, rgb: Tensor) -> Tensor:
        """Upsamples depth maps, each normalized by the mean and deviation of its measurements.

        Args:
            depth: (B, 1, h, w), in any unit. Pixels that are 0, negative, NaN or infinite are holes: they are filled
                from their surroundings and marked for the network.
            rgb: (B, 3, s*h, s*w), from 0 to 1.

        Returns:
            (B, 1, s*h, s*w), without holes, in the unit and dtype of ``depth``.

        Raises:
            ValueError: The shapes do not fit together.
        """
        self._check(depth, rgb)
        filled, valid = fill_holes(depth.float())
        mean, deviation = moments(filled, valid)
        normalized = (filled - mean) / deviation
        similarities = similarity_pyramid(rgb.float(), len(self.stages), self.sampling)
        rgb = (rgb - cast(Tensor, self.rgb_mean)) / cast(Tensor, self.rgb_std)
        guides = self.guidance(rgb)
        x = torch.cat((normalized, self.encoder(torch.cat((normalized, valid), 1)).float()), 1)
        for block in self.blocks:
            x = block(x, guides[-1])
        for index, stage in enumerate(self.stages):
            level = len(self.stages) - 1 - index
            x = stage(x, guides[level], similarities[level])
            if level:
                x = self.mixers[index](x, guides[level - 1])
        correction = self.head(torch.cat((x, self.photo(rgb).to(x.dtype)), 1))
        corrected: Tensor = (x[:, :1] + correction).float()
        return (corrected * deviation + mean).to(depth.dtype)

    def _check(self, depth: Tensor, rgb: Tensor) -> None:
        name, s = type(self).__name__, self.scale_factor
        if depth.ndim != 4 or depth.shape[1] != 1:
            raise ValueError(f"{name}: depth must be (B, 1, h, w), got {tuple(depth.shape)}")
        expected = (depth.shape[0], 3, s * depth.shape[2], s * depth.shape[3])
        if tuple(rgb.shape) != expected:
            raise ValueError(f"{name}: rgb must be (B, 3, {s}*h, {s}*w) = {expected}, got {tuple(rgb.shape)}")


class DDFUpNet(JointUpNet):
    """Joint depth upsampling by stacked DDF-Up layers.

    Args:
        scale_factor: s, one of 2, 4, 8 and 16.
        width: Channels of the features that are doubled, the depth map among them; 2 or more.
        guide_width: Channels of the photo's features.
        head_width: Channels at the photo's own scale.
        blocks: Residual blocks of the encoder.
        heads: Heads of the DDF-Up layers; divides ``width``.
        sampling: What a pixel of the small depth map is: "nearest", the depth at pixel ``(s - 1) // 2`` of its cell of
            s x s pixels, counted from 0 in both directions; or "mean", the mean of the cell. It decides where
            interpolation puts the pixel, and which of the photo's colors belongs to it.

    Attributes:
        arguments: The constructor's arguments by name.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 4.2.
    """

    def __init__(
        self,
        scale_factor: int = 8,
        width: int = 24,
        guide_width: int = 24,
        head_width: int = 12,
        blocks: int = 1,
        heads: int = 1,
        sampling: Sampling = "nearest",
    ) -> None:
        if heads < 1 or width % heads:
            raise ValueError(f"DDFUpNet: heads must divide width, got {heads} heads and a width of {width}")

        def make_stage(filters: Tensor) -> nn.Module:
            return DDFUpStage(width, guide_width, heads, filters)

        super().__init__(scale_factor, width, guide_width, head_width, blocks, sampling, make_stage)
        self.arguments["heads"] = heads


class JointConvUpNet(JointUpNet):
    """The same network with interpolation, convolutions and pixel shuffle instead of DDF-Up, as a baseline.

    It takes the arguments of :class:`DDFUpNet`, but ``squeeze`` instead of ``heads``.

    Args:
        squeeze: Channels between the two convolutions of a stage.

    Attributes:
        arguments: The constructor's arguments by name.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        scale_factor: int = 8,
        width: int = 24,
        guide_width: int = 24,
        head_width: int = 12,
        blocks: int = 1,
        squeeze: int = 6,
        sampling: Sampling = "nearest",
    ) -> None:
        if squeeze < 1:
            raise ValueError(f"JointConvUpNet: squeeze must be 1 or more, got {squeeze}")

        def make_stage(filters: Tensor) -> nn.Module:
            return ConvUpStage(width, guide_width, squeeze, filters)

        super().__init__(scale_factor, width, guide_width, head_width, blocks, sampling, make_stage)
        self.arguments["squeeze"] = squeeze


class Guidance(nn.Module):
    """The photo's features, at half its size, a quarter and so on.

    Each is computed from the one twice as large; the first from the photo with its pixels unshuffled. So a pixel can
    hold what its four pixels one scale up hold, which DDF-Up needs: its filters are predicted at the smaller scale.
    """

    def __init__(self, scales: int, width: int) -> None:
        super().__init__()
        firsts = [nn.Sequential(nn.PixelUnshuffle(2), _conv(12, width))]
        firsts += [nn.Sequential(_conv(width, width, stride=2)) for _ in range(scales - 1)]
        self.down = nn.ModuleList(nn.Sequential(first, nn.ReLU(), _conv(width, width), nn.ReLU()) for first in firsts)

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, width, H/2, W/2), (B, width, H/4, W/4) and so on."""
        features = []
        for down in self.down:
            rgb = down(rgb)
            features.append(rgb)
        return features


class Residual(nn.Module):
    """Two 3x3 convolutions of a feature and a guide, in_channels together, added to the feature; 0 at the start."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(in_channels, width), nn.ReLU(), _zero_init(_conv(width, width)))

    def forward(self, input: Tensor, guide: Tensor) -> Tensor:
        """(B, width, H, W) and (B, in_channels - width, H, W) -> (B, width, H, W)."""
        added: Tensor = self.body(torch.cat((input, guide.to(input.dtype)), 1))
        return input + added


class DDFUpStage(nn.Module):
    """Doubles a feature by DDF-Up; its spatial filters are predicted from photo, feature and color similarity.

    The two filters are added: FilterNorm's filters sum to 0, and on top of interpolation's, which sum to 1, they keep
    flat depth flat.
    """

    def __init__(self, width: int, guide_width: int, heads: int, filters: Tensor) -> None:
        super().__init__()
        self.guide = nn.Sequential(nn.Conv2d(width + guide_width, guide_width, 1), nn.ReLU())
        self.up = DDFUp2d(
            width,
            guide_channels=guide_width + _SIMILARITIES,
            heads=heads,
            combine="add",
            affine=True,
            padding_mode="replicate",
            squeeze_channels=narrow_squeeze_width(width, 0.2),  # as the networks in docs/depth.md were trained
        )
        _start_as_interpolation(self.up, filters, guide_width)

    def forward(self, input: Tensor, guide: Tensor, similarity: Tensor) -> Tensor:
        """(B, width, H, W), (B, guide_width, H, W), (B, 36, H, W) -> (B, width, 2*H, 2*W)."""
        mixed = self.guide(torch.cat((input, guide.to(input.dtype)), 1))
        doubled: Tensor = self.up(input, torch.cat((mixed, similarity.to(mixed.dtype)), 1))
        return doubled


class ConvUpStage(nn.Module):
    """Baseline of :class:`DDFUpStage`: interpolation, plus convolutions with pixel shuffle of the same input."""

    def __init__(self, width: int, guide_width: int, squeeze: int, filters: Tensor) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("filters", filters.repeat(width, 1, 1).unsqueeze(1), persistent=False)
        self.body = nn.Sequential(
            _conv(width + guide_width + _SIMILARITIES, squeeze),
            nn.ReLU(),
            _zero_init(_conv(squeeze, 4 * width)),
            nn.PixelShuffle(2),
        )

    def forward(self, input: Tensor, guide: Tensor, similarity: Tensor) -> Tensor:
        """(B, width, H, W), (B, guide_width, H, W), (B, 36, H, W) -> (B, width, 2*H, 2*W)."""
        added: Tensor = self.body(torch.cat((input, guide.to(input.dtype), similarity.to(input.dtype)), 1))
        bordered = F.pad(input, (1, 1, 1, 1), mode="replicate")
        filters = cast(Tensor, self.filters).to(input.dtype)
        return F.pixel_shuffle(F.conv2d(bordered, filters, groups=self.width), 2) + added


def similarity_pyramid(rgb: Tensor, scales: int, sampling: Sampling = "nearest") -> list[Tensor]:
    """Returns, for each scale, the color similarity of four pixels one scale up to the nine pixels around them.

    Args:
        rgb: (B, 3, H, W), from 0 to 1.
        scales: Number of scales.
        sampling: The color of a pixel of a smaller scale: "nearest", that of the photo's pixel where the depth is
            taken, or "mean", the mean of its cell.

    Returns:
        (B, 36, H/2, W/2), (B, 36, H/4, W/4) and so on, from 0 to 1; channel ``9 * q + k`` is for pixel q of four and k
        of nine, each counted row by row.
    """
    colors = [rgb]
    for scale in range(1, scales + 1):
        cell = 2**scale
        center = (cell - 1) // 2
        colors.append(F.avg_pool2d(rgb, cell) if sampling == "mean" else rgb[..., center::cell, center::cell])
    similarities = []
    for large, small in itertools.pairwise(colors):
        batch, _, height, width = small.shape
        around = F.unfold(F.pad(small, (1, 1, 1, 1), mode="replicate"), 3).view(batch, 3, 1, _TAPS, height, width)
        own = F.pixel_unshuffle(large, 2).view(batch, 3, 4, 1, height, width)
        similarities.append(torch.exp((own - around).abs().sum(1) / -_COLOR_SCALE).flatten(1, 2))
    return similarities


def interpolation_filters(align_first: bool = False) -> Tensor:
    """Returns the four 3x3 filters that double a map by bilinear interpolation: (4, 3, 3).

    Args:
        align_first: A pixel's value is that at the first of the four pixels that it becomes, instead of in the middle
            of them. That is the case for cells of 2 x 2 whose pixel ``(2 - 1) // 2`` was sampled. In larger cells of an
            even size, the pixels of both scales are off the middle by the same.
    """
    lines = [[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]] if align_first else [[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]]
    one, two = map(torch.tensor, lines)
    return torch.stack([torch.outer(rows, columns) for rows in (one, two) for columns in (one, two)])


@torch.no_grad()
def _start_as_interpolation(layer: DDFUp2d, filters: Tensor, guide_width: int) -> None:
    """Sets channel filters to interpolation's; the spatial filters, which are added, prefer pixels of similar color."""
    layer.fix(filters[:, None].expand(-1, layer.in_channels, -1, -1))
    for index, spatial in enumerate(layer.spatial_branch):
        conv, norm = cast(SpatialBranch, spatial)
        nn.init.constant_(cast(Tensor, norm.std), _INITIAL_STD)
        weight = cast(nn.Conv2d, conv).weight
        weight.mul_(_RANDOM_WEIGHTS)
        nn.init.zeros_(cast(Tensor, cast(nn.Conv2d, conv).bias))
        for tap in range(_TAPS):
            weight[tap::_TAPS, guide_width + _TAPS * index + tap] += 1.0


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)


def _zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Sets weight and bias to 0 and returns the convolution."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
