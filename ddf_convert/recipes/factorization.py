"""Convolutions as factors of DDF layers: depthwise then 1x1, 1x1 then depthwise, and upsampling as filters per phase.

Shapes: G groups, I input channels in a group, O output channels in a group, T = K*K taps. Everything is float64.

What upsamples by s makes an s x s cell of the output from the K x K pixels around each pixel of the input. That takes
s*s filters, which are called phases here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.conversion.eligibility import effective_weight

# Weight of the old weights beside the data, as a share of the mean second moment: the minimum, and the share for each
# unknown per position. Neighboring positions are similar, and few images do not show what others contain: with the
# minimum alone, VGG16's last layers fit 48 images and are 10 times off on others (benchmarks/recipes_vgg.py).
_MIN_PRIOR, _PRIOR_PER_UNKNOWN = 1e-3, 0.3
_JITTER = 1e-8  # keeps systems solvable where inputs do not vary
_ROUNDS = 2  # of alternating least squares; further ones gain less than a hundredth
_CUBIC = -0.75  # torch's parameter of the bicubic kernel
_EXAMPLE_SIZE = 16  # rows and columns of the map that the error of align_corners is calculated for


@dataclass(frozen=True)
class Factors:
    """A depthwise filter and a 1x1 convolution: ``weight[g, o, i, t] ~ mix[g, o, i] * depthwise[g, i, t]``.

    Attributes:
        depthwise: (G, I, T).
        mix: (G, O, I); None without a 1x1 convolution: then O is I, and ``weight[g, i, i, t] ~ depthwise[g, i, t]``.
    """

    depthwise: Tensor
    mix: Tensor | None

    def product(self) -> Tensor:
        """The weight that the factors make, (G, O, I, T)."""
        if self.mix is None:
            return torch.diag_embed(self.depthwise.transpose(1, 2)).permute(0, 2, 3, 1)
        return self.mix[..., None] * self.depthwise[:, None]


@dataclass
class Moments:
    """Second moments of a convolution's input patches p, and of p with the target outputs y.

    Attributes:
        inputs: (G, I, T, I, T), mean of p p'.
        cross: (G, O, I, T), mean of y p'.
        positions: Number of positions in the means; None if it is too large to matter.
    """

    inputs: Tensor
    cross: Tensor
    positions: int | None = None

    def with_prior(self, weight: Tensor) -> Moments:
        """Moments in which the old weights, (G, O, I, T), count a little: few images cannot lead far from them."""
        groups, width, taps = self.inputs.shape[:3]
        flat = self.inputs.reshape(groups, width * taps, width * taps)
        share = max(_MIN_PRIOR, _PRIOR_PER_UNKNOWN * width * taps / self.positions) if self.positions else _MIN_PRIOR
        ridge = share * flat.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12).view(-1, 1, 1)
        inputs = flat + ridge * torch.eye(width * taps, dtype=flat.dtype, device=flat.device)
        return replace(self, inputs=inputs.view_as(self.inputs), cross=self.cross + ridge[..., None] * weight)


def factorize_weights(weight: Tensor, has_mix: bool) -> Factors:
    """The factors nearest to a weight in the least-squares sense: for each input channel the best of rank one.

    Args:
        weight: (G, O, I, T).
        has_mix: Whether there is a 1x1 convolution.
    """
    if not has_mix:
        return Factors(weight.diagonal(dim1=1, dim2=2).transpose(1, 2).contiguous(), None)
    gram = torch.einsum("goit,goiu->gitu", weight, weight)
    depthwise = torch.linalg.eigh(gram).eigenvectors[..., -1]  # the taps that explain most, of norm 1
    return Factors(depthwise, torch.einsum("goit,git->goi", weight, depthwise))


def factorize_mix_first(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest 1x1 convolution with a filter for each output channel behind it, in the least-squares sense.

    Args:
        weight: (G, O, I, T); for upsampling, T counts the taps of all phases.

    Returns:
        The mix, (G, O, I), and the filters, (G, O, T): ``weight[g, o, i, t] ~ mix[g, o, i] * filter[g, o, t]``.
    """
    if weight.shape[2] >= weight.shape[3]:  # either of two Gram matrices gives the result; this one is smaller
        factors = factorize_weights(weight.transpose(1, 2), True)
        assert factors.mix is not None
        return factors.mix.transpose(1, 2), factors.depthwise
    mix = torch.linalg.eigh(torch.einsum("goit,gojt->goij", weight, weight)).eigenvectors[..., -1]
    filters = torch.einsum("goit,goi->got", weight, mix)
    norm = filters.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return mix * norm, filters / norm


def factorize_moments(moments: Moments, weight: Tensor, has_mix: bool) -> Factors:
    """The factors whose outputs are nearest to the target outputs.

    Alternating least squares, from the best for the weights: each factor is solved exactly, for all channels at once,
    while the other is fixed.

    Args:
        moments: Of the layer's inputs and the target outputs.
        weight: (G, O, I, T), of the old convolution: counts as a few more data.
        has_mix: Whether there is a 1x1 convolution.
    """
    moments = moments.with_prior(weight)
    if not has_mix:
        inputs = moments.inputs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (G, I, T, T)
        targets = moments.cross.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (G, I, T)
        return Factors(_solve(inputs, targets[..., None])[..., 0], None)
    factors = factorize_weights(weight, has_mix)
    for _ in range(_ROUNDS):
        factors = _with_best_depthwise(moments, _with_best_mix(moments, factors.depthwise))
    return _with_best_mix(moments, factors.depthwise)


def _with_best_mix(moments: Moments, depthwise: Tensor) -> Factors:
    depthwise = F.normalize(depthwise, dim=-1)
    half = torch.einsum("gitju,gju->gitj", moments.inputs, depthwise)
    gram = torch.einsum("gitj,git->gij", half, depthwise)
    targets = torch.einsum("goit,git->goi", moments.cross, depthwise)
    return Factors(depthwise, _solve(gram, targets.transpose(1, 2)).transpose(1, 2))


def _with_best_depthwise(moments: Moments, factors: Factors) -> Factors:
    assert factors.mix is not None
    groups, width, taps = factors.depthwise.shape
    mix_gram = torch.einsum("goi,goj->gij", factors.mix, factors.mix)
    system = (moments.inputs * mix_gram[:, :, None, :, None]).reshape(groups, width * taps, width * taps)
    targets = torch.einsum("goi,goit->git", factors.mix, moments.cross).reshape(groups, width * taps, 1)
    return Factors(_solve(system, targets).view(groups, width, taps), factors.mix)


def _solve(system: Tensor, targets: Tensor) -> Tensor:
    """Solves symmetric systems that may be singular."""
    size = system.shape[-1]
    jitter = _JITTER * system.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    system = system + jitter[..., None, None] * torch.eye(size, dtype=system.dtype, device=system.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        solution: Tensor = torch.linalg.lstsq(system, targets).solution
        return solution
    return torch.cholesky_solve(targets, factor)


def interpolation_phases(mode: str, factor: int, kernel_size: int) -> Tensor:
    """The phases of an interpolation without ``align_corners``: (s*s, K, K), for a map whose borders are replicated.

    Args:
        mode: Of ``F.interpolate``.
        factor: s.
        kernel_size: K; 3 is enough, and 5 for "bicubic".
    """
    offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2  # of the taps, from the pixel
    centers = (torch.arange(factor, dtype=torch.float64) + 0.5) / factor - 0.5  # of the cell's pixels, from the pixel's
    distances = (centers[:, None] - offsets).abs()
    if mode == "bilinear":
        rows = (1 - distances).clamp_min(0)
    elif mode == "bicubic":
        near = ((_CUBIC + 2) * distances - (_CUBIC + 3)) * distances**2 + 1
        far = ((distances - 5) * distances + 8) * distances * _CUBIC - 4 * _CUBIC
        rows = torch.where(distances <= 1, near, torch.where(distances < 2, far, 0.0))
    else:  # the pixel itself; "area" averages the area of an output pixel, which lies within it
        rows = (offsets == 0).double().expand(factor, -1)
    return torch.einsum("dt,eu->detu", rows, rows).reshape(factor**2, kernel_size, kernel_size)


def alignment_error(mode: str, factor: int) -> float:
    """How much an interpolation with ``align_corners=True`` differs from the one without: a relative Frobenius norm.

    The norm is over the linear maps, on a map of 16x16 pixels: how much the outputs differ if the input is noise. On
    smooth inputs they differ by less.
    """
    # The linear map of rows and columns together is the Kronecker product of the map of rows with itself.
    rows = torch.eye(_EXAMPLE_SIZE, dtype=torch.float64).view(_EXAMPLE_SIZE, 1, _EXAMPLE_SIZE, 1)
    size = (_EXAMPLE_SIZE * factor, 1)
    aligned, other = (F.interpolate(rows, size, mode=mode, align_corners=flag).flatten() for flag in (True, False))
    norm = aligned.dot(aligned) ** 2
    difference = norm - 2 * aligned.dot(other) ** 2 + other.dot(other) ** 2
    return float((difference / norm).sqrt())


def transposed_phases(conv: nn.ConvTranspose2d, kernel_size: int) -> Tensor:
    """The phases of a transposed convolution: (G, O, I, s*s*K*K).

    ``output[s*y + d]`` is the sum over j of ``input[y + j] * weight[d + padding - j*s]``.

    Args:
        conv: Square, not dilated; its output is s times as large as its input.
        kernel_size: K, large enough for all taps.
    """
    groups, factor, size = conv.groups, conv.stride[0], conv.kernel_size[0]
    shifts = torch.arange(kernel_size) - kernel_size // 2
    taps = torch.arange(factor)[:, None] + int(conv.padding[0]) - shifts * factor  # (s, K)
    chosen = (taps[..., None] == torch.arange(size)).to(conv.weight.device, torch.float64)  # (s, K, k)
    weight = conv.weight.detach().double().view(groups, conv.in_channels // groups, -1, size, size)
    phases = torch.einsum("giokl,dtk,eul->goidetu", weight, chosen, chosen)
    return phases.flatten(3)


def shuffled_phases(conv: nn.Conv2d, factor: int) -> Tensor:
    """The phases of a convolution with a pixel shuffle by ``factor`` behind it: (G, O, I, s*s*K*K)."""
    groups, inputs = conv.groups, conv.in_channels // conv.groups
    weight = effective_weight(conv).double().reshape(groups, -1, factor**2, inputs, conv.kernel_size[0] ** 2)
    return weight.transpose(2, 3).flatten(3)
