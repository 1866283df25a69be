"""Random, augmented crops of random pairs. Every crop is a function of the seed and its number."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.depth.pairs import Pairs
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training.sampler import permutation, seed_for

_CACHE_BYTES = 1 << 30  # of pairs that stay in memory
_ATTEMPTS = 10  # to find a crop that is not all hole
_CROPS = 0x63726F70  # separates these seeds from others of the same numbers


class Crops:
    """Crops by number, each pair in turn before any comes again.

    Args:
        pairs: To take crops from.
        size: Rows and columns of a crop; smaller pairs are enlarged by reflection.
        augmentation: ``scale`` is the range of the area that a crop shows, as a multiple of its own; ``hflip`` and
            ``vflip`` are probabilities; ``color_jitter`` is how far brightness and gamma vary. If it is above 0 the
            channels are also permuted, and half of the crops inverted: with few data a network would take color for a
            sign of depth. None varies nothing.
        seed: Of the run.
        turned: Probability that near and far change places in a crop's depth map, while edges stay: few data should
            teach where edges are, and not how far away things were.
    """

    def __init__(
        self, pairs: Pairs, size: int, augmentation: Augmentation | None, seed: int, turned: float = 0.0
    ) -> None:
        self.pairs, self.size, self.augmentation, self.seed, self.turned = pairs, size, augmentation, seed, turned
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Returns crops from a number on: photos (count, 3, size, size) from 0 to 1, depths (count, 1, size, size)."""
        photos, depths = zip(*(self._crop(number) for number in range(first, first + count)), strict=True)
        return torch.stack(photos), torch.stack(depths)

    def _crop(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(number, len(self.pairs))
        photo, depth = self._pair(int(permutation(len(self.pairs), self.seed, epoch)[place]))
        random = np.random.default_rng(seed_for(self.seed, _CROPS, number))
        for _ in range(_ATTEMPTS):
            crop = self._cut(photo, depth, random)
            if crop[1].count_nonzero() * 10 > crop[1].numel():
                break
        return self._augment(*crop, random)

    def _cut(self, photo: Tensor, depth: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = self.size
        shortest = min(depth.shape[-2:])
        smallest, largest = self.augmentation.scale if self.augmentation else (1.0, 1.0)
        area = math.exp(random.uniform(math.log(smallest), math.log(largest)))
        side = max(2, min(round(size * area**0.5), max(size, shortest)))
        short = [max(0, side - length) for length in depth.shape[-2:]]
        if any(short):
            photo, depth = (_reflect(image, short) for image in (photo, depth))
        top, left = (int(random.integers(length - side + 1)) for length in depth.shape[-2:])
        view = (..., slice(top, top + side), slice(left, left + side))
        photo, depth = photo[view].float() / 255, depth[view]
        if side == size:
            return photo, depth
        photo = F.interpolate(photo[None], size=(size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
        # nearest: a mean of the depths on both sides of an edge is no depth
        return photo, F.interpolate(depth[None], size=(size, size), mode="nearest-exact")[0]

    def _augment(self, photo: Tensor, depth: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        augmentation = self.augmentation
        if augmentation is None:
            return photo, depth
        if random.random() < self.turned and (known := depth > 0).any():
            depth = torch.where(known, depth[known].min() + depth.max() - depth, 0.0)
        for probability, axis in ((augmentation.hflip, -1), (augmentation.vflip, -2)):
            if random.random() < probability:
                photo, depth = photo.flip(axis), depth.flip(axis)
        if augmentation.color_jitter:
            gain, shift, gamma = random.uniform(-augmentation.color_jitter, augmentation.color_jitter, 3)
            photo = (photo * (1 + gain) + shift / 2).clamp(0, 1) ** math.exp(gamma)
            photo = photo[torch.from_numpy(random.permutation(3))]
            if random.random() < 0.5:
                photo = 1 - photo
        return photo, depth

    def _pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a pair, from a cache of the last ones."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        pair = self.pairs[index]
        self._cache[index] = pair
        self._bytes += sum(image.nbytes for image in pair)
        while self._bytes > _CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= sum(image.nbytes for image in dropped)
        return pair


def _reflect(image: Tensor, short: list[int]) -> Tensor:
    """Adds rows and columns that mirror those before them, as often as that takes."""
    for axis, missing in zip((-2, -1), short, strict=True):
        length = image.shape[axis]
        places = torch.arange(length + missing) % (2 * length)
        places = torch.where(places < length, places, 2 * length - 1 - places)
        image = image.index_select(axis, places)
    return image
