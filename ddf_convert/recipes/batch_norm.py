"""Statistics of batch normalizations behind new layers: of the new features they make what the original had."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_convert.recipes.capture import run_to

_Statistics = tuple[Tensor, Tensor]


class BatchNorms:
    """The batch normalizations of a converted model, to be adjusted from the first of the forward pass to the last.

    Where the original's running statistics are those of the images, the new ones are those of the new features on the
    images. Where they are not (other images than it was trained on), the original puts out features that are not
    centered and scaled to one, and then the model shall put out the same.

    Args:
        model: The converted model, in evaluation mode.
        original: The model before conversion, in evaluation mode; it stays as it is.
    """

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        self.model, self.original = model, original
        known = dict(original.named_modules())
        self.waiting: dict[str, tuple[_BatchNorm, _BatchNorm]] = {}
        for name, norm in model.named_modules():
            counterpart = known.get(name)
            if isinstance(norm, _BatchNorm) and isinstance(counterpart, _BatchNorm) and norm.running_mean is not None:
                self.waiting[name] = (norm, counterpart)

    @torch.no_grad()
    def adjust(
        self, images: Sequence[Tensor], here: nn.Module | None = None, there: nn.Module | None = None
    ) -> list[str]:
        """Adjusts those that are called before a layer and have not been adjusted yet.

        Args:
            images: Batches, (B, C, H, W).
            here: The layer of the model; None is the end of its forward pass.
            there: The layer of the original.

        Returns:
            Their names.
        """
        sums: dict[str, list[_Statistics]] = {}
        for batch in images:
            wanted: dict[str, _Statistics] = {}
            with ExitStack() as hooks:
                for name, (_, counterpart) in self.waiting.items():
                    hooks.callback(counterpart.register_forward_pre_hook(partial(_note, wanted, name)).remove)
                run_to(self.original, there, batch)
            with ExitStack() as hooks:
                for name, (norm, counterpart) in self.waiting.items():
                    if name in wanted:
                        seen = _Adjusting(norm, counterpart, wanted[name], sums.setdefault(name, []))
                        hooks.callback(norm.register_forward_pre_hook(seen).remove)
                run_to(self.model, here, batch)
        done = [name for name, statistics in sums.items() if statistics]
        for name in done:
            norm, _ = self.waiting.pop(name)
            means, variances = zip(*sums[name], strict=True)
            _set(norm, torch.stack(means).mean(0), torch.stack(variances).mean(0))
        return done


class _Adjusting:
    """Sets a normalization's statistics for the batch at hand, so that what follows sees the right features."""

    def __init__(
        self, norm: _BatchNorm, counterpart: _BatchNorm, wanted: _Statistics, found: list[_Statistics]
    ) -> None:
        self.norm, self.counterpart, self.wanted, self.found = norm, counterpart, wanted, found
        self.called = False

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.called:  # a shared one follows its first call
            return
        self.called = True
        assert self.counterpart.running_mean is not None
        assert self.counterpart.running_var is not None
        mean, variance = _statistics(args[0])
        old_mean, old_variance = self.wanted
        eps = self.counterpart.eps
        ratio = (variance + eps) / (old_variance + eps)
        new_variance = (self.counterpart.running_var.float() + eps) * ratio - self.norm.eps
        new_mean = mean - ratio.sqrt() * (old_mean - self.counterpart.running_mean.float())
        self.found.append((new_mean, new_variance.clamp_min(0)))
        _set(self.norm, *self.found[-1])


def _statistics(feature: Tensor) -> _Statistics:
    """Mean and variance of every channel of (B, C, ...), in float32."""
    flat = feature.float().transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(flat, dim=1, correction=0)
    return mean, variance


def _note(found: dict[str, _Statistics], name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    found.setdefault(name, _statistics(args[0]))


def _set(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
