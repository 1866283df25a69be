"""Before training: the new layers of a converted model get the weights that they start from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ddf_convert.recipes import Initialised, Recipe
from ddf_convert.training.images import open_images
from ddf_convert.training.loading import evaluation_loader, image_settings


def initialise(
    recipe: Recipe,
    model: nn.Module,
    original: nn.Module,
    data: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Initialised:
    """As ``recipe.initialise``, with images from where the command line says.

    Args:
        recipe: The recipe.
        model: The converted model; it is on the CPU at the end.
        original: The model before conversion; likewise.
        data: As for ``open_images``; only a recipe that calibrates looks at it.
        input_size: (C, H, W) of the images; None is what the model expects.
        device: Where to calibrate.
        say: Told what is being done.

    Raises:
        UsageError: There are no such images, or as for ``recipe.initialise``.
    """
    settings = recipe.initialise_with
    if settings.method != "calibrate" or data is None:
        return recipe.initialise(model, original, say=say)
    images = open_images(data, "train", labelled=False)
    count = min(len(images), settings.num_images)
    chosen = images.subset(
        [index * len(images) // count for index in range(count)]
    )  # from all over: classes are sorted
    where = device or torch.device("cpu")
    loader = evaluation_loader(chosen, image_settings(original, input_size), settings.batch_size, device=where)
    try:
        return recipe.initialise(model.to(where), original.to(where), loader, say=say)
    finally:
        model.cpu()
        original.cpu()
