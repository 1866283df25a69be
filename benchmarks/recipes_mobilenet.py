"""MobileNetV2 with ImageNet weights, its depthwise convolutions replaced, by the recipe ``preserve``: nothing is lost.

    python benchmarks/fetch_real.py          once
    python benchmarks/recipes_mobilenet.py   a minute; writes recipes_mobilenet.json and .md

Outputs and top-1 on 20 photos before and after, and which parameters get gradients when training goes on from there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from common.markdown import table
from common.results import exit_code, machine, run_study, study_parser
from common.sources import MOBILENET, center_crop, labelled_photos, read_photo
from torch import Tensor, nn

from ddf_convert import recipes
from ddf_convert.recipes.parameters import new_layers

NAME = "recipes_mobilenet"
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights expect
# What the parameters of a DDF layer are, by how their names start; in the order of the table.
PARTS = {
    "spatial_branch.0": "spatial filter: its 1x1 convolution",
    "spatial_branch.1.std": "spatial filter: FilterNorm's scale",
    "spatial_branch.1.mean": "spatial filter: FilterNorm's shift",
    "channel_branch.1": "channel filter: squeeze",
    "channel_branch.3": "channel filter: expand",
    "channel_branch.4.std": "channel filter: FilterNorm's scale",
    "channel_branch.4.mean": "channel filter: FilterNorm's shift",
    "mix": "1x1 convolution behind",
    "bias": "bias",
}

Coverage = dict[str, tuple[int, int]]


def main() -> None:
    run_study(NAME, study_parser(__doc__).parse_args(), measure, page)


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    files, labels = labelled_photos()
    images = normalize(torch.stack([center_crop(read_photo(file), SIZE) for file in files]))
    original = pretrained()
    recipe = recipes.load("preserve")
    model = recipe.convert(original, images[:1], depthwise=True).eval()
    with torch.no_grad():
        expected, random = original(images), model(images)
        start = time.monotonic()
        report = recipe.initialize(model, original)
        seconds = time.monotonic() - start
        preserved = model(images)
    finetune = recipes.load("finetune")
    losses, groups = finetune.losses(model, "everything"), finetune.parameter_groups(model, "everything")
    gradients = coverage_over_steps(model, losses, groups, (images[:8], labels[:8]), 2)
    return {
        "machine": machine(),
        "layers": len(report.layers),
        "photos": len(files),
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (preserved - expected).abs().max().item(),
        "largest_difference_random": (random - expected).abs().max().item(),
        "largest_weight_error": max(layer.weight_error for layer in report.layers),
        "initialise_seconds": seconds,
        "right": {
            "original": correct(expected, labels),
            "converted, random": correct(random, labels),
            "preserve": correct(preserved, labels),
        },
        "same_class": correct(preserved, expected.argmax(1)),
        "gradients": gradients,
    }


def pretrained() -> nn.Module:
    """Returns timm's model with torchvision's weights, whose names differ and whose order is the same."""
    model = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    weights = torch.load(MOBILENET.get(), weights_only=True)
    own = model.state_dict()
    assert len(own) == len(weights)
    model.load_state_dict({name: value.view_as(own[name]) for name, value in zip(own, weights.values(), strict=True)})
    return model


def normalize(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def correct(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())


def grad_coverage(model: nn.Module) -> Coverage:
    """Counts, by part of the new layers, the parameters with a gradient that is not 0 throughout, and all of them."""
    counts: Coverage = {}
    for layer in new_layers(model).values():
        for name, parameter in layer.named_parameters():
            part = part_of(name)
            covered, total = counts.get(part, (0, 0))
            has_gradient = parameter.grad is not None and bool(parameter.grad.any())
            counts[part] = covered + int(has_gradient), total + 1
    return {part: counts[part] for part in PARTS.values() if part in counts}


def part_of(name: str) -> str:
    """Returns the part of a DDF layer that a parameter belongs to."""
    return next(part for start, part in PARTS.items() if name.removeprefix("ddf.").startswith(start))


def coverage_over_steps(
    model: nn.Module, objective: nn.Module, groups: Iterable[dict], batch: tuple[Tensor, Tensor], steps: int
) -> list[Coverage]:
    """Trains the model for some steps; returns the coverage at each of them."""
    optimizer = torch.optim.AdamW(list(groups))
    model.train()
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        objective(*batch)["loss"].backward()
        found.append(grad_coverage(model))
        optimizer.step()
    return found


def page(document: dict[str, Any]) -> Iterator[str]:
    count, photos, right = document["layers"], document["photos"], document["right"]
    yield "# MobileNetV2 with ImageNet weights, by the recipe `preserve`"
    yield ""
    yield f"All {count} depthwise 3x3 convolutions of `mobilenetv2_100` replaced (`depthwise=True`), {photos} photos of"
    yield f"ImageNet at {SIZE}x{SIZE}. The recipe took {document['initialise_seconds']:.2f} s and looked at no image."
    yield ""
    rows = [
        ("original", right["original"], "0"),
        ("converted, new layers random", right["converted, random"], f"{document['largest_difference_random']:.2g}"),
        ("converted, `preserve`", right["preserve"], f"{document['largest_difference']:.2g}"),
    ]
    body = [(name, f"{correct} of {photos}", difference) for name, correct, difference in rows]
    yield from table(("", "top-1", "largest difference of a logit"), body, numbers=True)
    yield f"The largest logit is {document['largest_logit']:.1f}; the difference is rounding in float32."
    yield f"The classes of {document['same_class']} of {photos} photos are those of the original."
    yield ""
    yield "What a gradient reaches when training goes on (tensors of all new layers; the loss and the optimizer of"
    yield "`finetune`, on 8 of the photos):"
    yield ""
    first, second = document["gradients"]
    body = [
        (part, f"{covered} of {total}", f"{second[part][0]} of {total}") for part, (covered, total) in first.items()
    ]
    yield from table(("part", "first step", "second step"), body, numbers=True)
    yield "Both scales, which start at 0, have gradients at the first step; what stands before them has, once they have"
    yield "moved, from the second."
    yield ""


if __name__ == "__main__":
    sys.exit(exit_code(main))
