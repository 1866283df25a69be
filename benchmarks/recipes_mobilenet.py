"""MobileNetV2 with ImageNet weights, its depthwise convolutions replaced, by the recipe ``preserve``: nothing is lost.

    python benchmarks/fetch_real.py          once
    python benchmarks/recipes_mobilenet.py   a minute; writes recipes_mobilenet.json and .md

Outputs and top-1 on 20 photos before and after, and what gradients reach when training goes on from there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from recipe_parts.images import center, labelled, photo
from recipe_parts.page import machine, options, run, table, write
from recipe_parts.reached import over_steps
from recipe_parts.sources import MOBILENET
from torch import Tensor, nn

from ddf_convert import recipes

SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights expect
NAME = "recipes_mobilenet"


def main() -> None:
    folder: Path = options(__doc__).results
    start = time.monotonic()
    document = study()
    document["seconds"] = time.monotonic() - start
    lines = list(page(document))
    write(folder, NAME, document, lines)
    print("\n".join(lines))


def study() -> dict[str, Any]:
    """Everything that is measured."""
    torch.manual_seed(0)
    files, labels = labelled()
    images = normalized(torch.stack([center(photo(file), SIZE) for file in files]))
    original = pretrained()
    recipe = recipes.load("preserve")
    model = recipe.convert(original, images[:1], depthwise=True).eval()
    with torch.no_grad():
        expected, random = original(images), model(images)
        begin = time.monotonic()
        done = recipe.initialize(model, original)
        seconds = time.monotonic() - begin
        found = model(images)
    finetune = recipes.load("finetune")
    objective, groups = finetune.losses(model, "everything"), finetune.parameter_groups(model, "everything")
    steps = over_steps(model, objective, groups, (images[:8], labels[:8]), 2)
    return {
        "machine": machine(),
        "layers": len(done.layers),
        "photos": len(files),
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (found - expected).abs().max().item(),
        "largest_difference_random": (random - expected).abs().max().item(),
        "largest_weight_error": max(layer.weight_error for layer in done.layers),
        "initialise_seconds": seconds,
        "right": {
            "original": right(expected, labels),
            "converted, random": right(random, labels),
            "preserve": right(found, labels),
        },
        "same_class": right(found, expected.argmax(1)),
        "gradients": steps,
    }


def pretrained() -> nn.Module:
    """The model; the file is torchvision's, whose names are others and whose order is the same."""
    model = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    weights = torch.load(MOBILENET.get(), weights_only=True)
    own = model.state_dict()
    assert len(own) == len(weights)
    model.load_state_dict({name: value.view_as(own[name]) for name, value in zip(own, weights.values(), strict=True)})
    return model


def normalized(images: Tensor) -> Tensor:
    """As the model expects them, from 0 to 255."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


def right(logits: Tensor, labels: Tensor) -> int:
    """How many have the largest logit where the label is."""
    return int((logits.argmax(1) == labels).sum())


def page(document: dict[str, Any]):
    """Lines of Markdown."""
    count, photos, hits = document["layers"], document["photos"], document["right"]
    yield "# MobileNetV2 with ImageNet weights, by the recipe `preserve`"
    yield ""
    yield f"All {count} depthwise 3x3 convolutions of `mobilenetv2_100` replaced (`depthwise=True`), {photos} photos of"
    yield f"ImageNet at {SIZE}x{SIZE}. The recipe took {document['initialise_seconds']:.2f} s and looked at no image."
    yield ""
    rows = [
        ("original", f"{hits['original']} of {photos}", "0"),
        ("converted, new layers random", f"{hits['converted, random']} of {photos}", "largest_difference_random"),
        ("converted, `preserve`", f"{hits['preserve']} of {photos}", "largest_difference"),
    ]
    rows = [(name, hit, f"{document[key]:.2g}" if key in document else key) for name, hit, key in rows]
    yield from table(("", "top-1", "largest difference of a logit"), rows)
    yield f"The largest logit is {document['largest_logit']:.1f}; the difference is rounding in float32."
    yield f"The classes of {document['same_class']} of {photos} photos are those of the original."
    yield ""
    yield "What a gradient reaches when training goes on (tensors of all new layers; the loss and the optimizer of"
    yield "`finetune`, on 8 of the photos):"
    yield ""
    first, second = document["gradients"]
    rows = [(part, f"{yes} of {all_}", f"{second[part][0]} of {all_}") for part, (yes, all_) in first.items()]
    yield from table(("part", "first step", "second step"), rows)
    yield "Both scales, which start at 0, have gradients at the first step; what stands before them has, once they have"
    yield "moved, from the second."
    yield ""


if __name__ == "__main__":
    sys.exit(run(main))
