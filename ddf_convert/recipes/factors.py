"""A convolution as a depthwise one and a 1x1 that mixes: the best one for the weights, or for what the inputs are like.

Shapes: G groups, I input channels in a group, O output channels in a group, T = K*K taps. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How much the old weights count beside the data, as a share of the mean second moment: the least, and for each unknown
# that a position has to answer for. Neighboring positions are much alike, and few images do not show what others have:
# with the least alone, VGG16's last layers fit 48 images and are 10 times off on others (benchmarks/recipes_vgg.py).
_LEAST_PRIOR, _PRIOR = 1e-3, 0.3
_JITTER = 1e-8  # keeps systems solvable where inputs do not vary
_ROUNDS = 2  # further ones gain less than a hundredth


@dataclass(frozen=True)
class Factors:
    """``weight[g, o, i, t] ~ mix[g, o, i] * depthwise[g, i, t]``.

    Attributes:
        depthwise: (G, I, T).
        mix: (G, O, I); None if nothing mixes: then O is I, and ``weight[g, i, i, t] ~ depthwise[g, i, t]``.
    """

    depthwise: Tensor
    mix: Tensor | None

    def product(self) -> Tensor:
        """The weight that they come to, (G, O, I, T)."""
        if self.mix is None:
            return torch.diag_embed(self.depthwise.transpose(1, 2)).permute(0, 2, 3, 1)
        return self.mix[..., None] * self.depthwise[:, None]


@dataclass
class Moments:
    """Second moments of a convolution's input patches p, and of them with the outputs y that are wanted.

    Attributes:
        inputs: (G, I, T, I, T), mean of p p'.
        cross: (G, O, I, T), mean of y p'.
        positions: How many they are means of; None is so many that the number does not matter.
    """

    inputs: Tensor
    cross: Tensor
    positions: int | None = None

    def with_prior(self, weight: Tensor) -> Moments:
        """Moments in which the old weights, (G, O, I, T), count a little: few images cannot lead far from them."""
        groups, width, taps = self.inputs.shape[:3]
        flat = self.inputs.reshape(groups, width * taps, width * taps)
        share = max(_LEAST_PRIOR, _PRIOR * width * taps / self.positions) if self.positions else _LEAST_PRIOR
        ridge = share * flat.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12).view(-1, 1, 1)
        inputs = flat + ridge * torch.eye(width * taps, dtype=flat.dtype, device=flat.device)
        return replace(self, inputs=inputs.view_as(self.inputs), cross=self.cross + ridge[..., None] * weight)


def best_for_weights(weight: Tensor, mixes: bool) -> Factors:
    """The factors nearest to a weight in the least-squares sense: for each input channel the best of rank one.

    Args:
        weight: (G, O, I, T), float64.
        mixes: Whether there is a 1x1 convolution.
    """
    if not mixes:
        return Factors(weight.diagonal(dim1=1, dim2=2).transpose(1, 2).contiguous(), None)
    gram = torch.einsum("goit,goiu->gitu", weight, weight)
    depthwise = torch.linalg.eigh(gram).eigenvectors[..., -1]  # the taps that explain most, of norm 1
    return Factors(depthwise, torch.einsum("goit,git->goi", weight, depthwise))


def best_for_outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A 1x1 that mixes and, behind it, a filter for each output channel: the nearest to a weight, in the same sense.

    Args:
        weight: (G, O, I, T), float64; T is that of all phases together, where it upsamples.

    Returns:
        The mix, (G, O, I), and the filters, (G, O, T): ``weight[g, o, i, t] ~ mix[g, o, i] * filter[g, o, t]``.
    """
    if weight.shape[2] >= weight.shape[3]:  # the smaller of two matrices of products says the same
        factors = best_for_weights(weight.transpose(1, 2), True)
        assert factors.mix is not None
        return factors.mix.transpose(1, 2), factors.depthwise
    mix = torch.linalg.eigh(torch.einsum("goit,gojt->goij", weight, weight)).eigenvectors[..., -1]
    filters = torch.einsum("goit,goi->got", weight, mix)
    norm = filters.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return mix * norm, filters / norm


def best_for_moments(moments: Moments, weight: Tensor, mixes: bool) -> Factors:
    """The factors whose outputs are nearest to those wanted.

    Alternating least squares, from the best for the weights: each half is solved exactly, for all channels at once,
    while the other half is given.

    Args:
        moments: Of the inputs that the layer gets, and the outputs that are wanted of it.
        weight: (G, O, I, T), of the old convolution: counts as a few more data.
        mixes: Whether there is a 1x1 convolution.
    """
    moments = moments.with_prior(weight)
    if not mixes:
        inputs = moments.inputs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (G, I, T, T)
        wanted = moments.cross.diagonal(dim1=1, dim2=2).transpose(1, 2)  # (G, I, T)
        return Factors(_solve(inputs, wanted[..., None])[..., 0], None)
    factors = best_for_weights(weight, mixes)
    for _ in range(_ROUNDS):
        factors = _with_best_depthwise(moments, _with_best_mix(moments, factors.depthwise))
    return _with_best_mix(moments, factors.depthwise)


def _with_best_mix(moments: Moments, depthwise: Tensor) -> Factors:
    depthwise = torch.nn.functional.normalize(depthwise, dim=-1)
    half = torch.einsum("gitju,gju->gitj", moments.inputs, depthwise)
    gram = torch.einsum("gitj,git->gij", half, depthwise)
    wanted = torch.einsum("goit,git->goi", moments.cross, depthwise)
    return Factors(depthwise, _solve(gram, wanted.transpose(1, 2)).transpose(1, 2))


def _with_best_depthwise(moments: Moments, factors: Factors) -> Factors:
    assert factors.mix is not None
    groups, width, taps = factors.depthwise.shape
    mixing = torch.einsum("goi,goj->gij", factors.mix, factors.mix)
    system = (moments.inputs * mixing[:, :, None, :, None]).reshape(groups, width * taps, width * taps)
    wanted = torch.einsum("goi,goit->git", factors.mix, moments.cross).reshape(groups, width * taps, 1)
    return Factors(_solve(system, wanted).view(groups, width, taps), factors.mix)


def _solve(system: Tensor, wanted: Tensor) -> Tensor:
    """Solves symmetric systems that may be singular."""
    size = system.shape[-1]
    jitter = _JITTER * system.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    system = system + jitter[..., None, None] * torch.eye(size, dtype=system.dtype, device=system.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed.any():
        solution: Tensor = torch.linalg.lstsq(system, wanted).solution
        return solution
    return torch.cholesky_solve(wanted, factor)
