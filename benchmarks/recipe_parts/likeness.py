"""How near a converted trunk is to the original, layer by layer, and in the edges that are made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddf_convert.recipes.losses import FeatureExtractor
from recipe_parts.vgg import VGG16, Edges

LAST = "last map"


class Likeness:
    """Compares models with the original on the same images.

    Args:
        original: The trunk.
        edges: What stands behind it.
        images: (B, 3, H, W), prepared.
        at_once: Images of one pass.
    """

    def __init__(self, original: VGG16, edges: Edges, images: Tensor, at_once: int = 5) -> None:
        self.edges = edges
        self.images = images.split(at_once)
        self.expected = [maps(original, batch) for batch in self.images]

    @torch.no_grad()
    def of(self, model: VGG16) -> dict[str, Any]:
        """Relative errors of every convolution's output and of the last map; F1 of the edges.

        An error is the root of the squared distance over the squared norm, of all images together: 0 is equal, 1 as far
        off as a map of zeros.
        """
        distance = dict.fromkeys([*model.names, LAST], 0.0)
        norm = dict.fromkeys(distance, 0.0)
        both = mine = theirs = 0
        for batch, expected in zip(self.images, self.expected, strict=True):
            found = maps(model, batch)
            for name in distance:
                distance[name] += (found[name] - expected[name]).double().square().sum().item()
                norm[name] += expected[name].double().square().sum().item()
            edges, wanted = (self.edges([each[end].relu() for end in model.ends]) > 0.5 for each in (found, expected))
            both, mine = both + int((edges & wanted).sum()), mine + int(edges.sum())
            theirs += int(wanted.sum())
        return {
            "error": {name: (distance[name] / norm[name]) ** 0.5 for name in distance},
            "edges_f1": 2 * both / max(1, mine + theirs),
        }


@torch.no_grad()
def maps(model: VGG16, images: Tensor) -> dict[str, Tensor]:
    """What every convolution puts out, and the last map."""
    last, seen = FeatureExtractor(model, model.names)(images)
    return {**dict(zip(model.names, seen, strict=True)), LAST: last}
