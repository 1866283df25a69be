"""What a run needs, opened and checked against each other before anything is trained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_convert import recipes
from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.atomic import MANIFEST
from ddf_convert.artifacts.source import ConvertedFolder, open_model
from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.recipes import Initialized, Recipe
from ddf_convert.recipes.parameters import trainable_names
from ddf_convert.recipes.schema import Stage
from ddf_convert.training.dataloader import ImageSettings, evaluation_loader, image_settings, make_transform
from ddf_convert.training.dataset import ImageDataset, MissingSplitError, OnBroken, Split, open_images, random_split
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.distributed import Processes
from ddf_convert.training.run_dir import BEST, is_run
from ddf_convert.training.sampler import seed_for, seeded
from ddf_convert.training.stage import Data, order_of


def initialize(
    recipe: Recipe,
    model: nn.Module,
    original: nn.Module,
    data: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Initialized:
    """As ``recipe.initialize``, with images from where the command line says.

    Args:
        recipe: The recipe.
        model: The converted model; it is on the CPU at the end.
        original: The model before conversion; likewise.
        data: As for ``open_images``; only a recipe that calibrates looks at it.
        input_size: (C, H, W) of the images; None is what the model expects.
        device: Where to calibrate.
        say: Told what is being done.

    Raises:
        UsageError: There are no such images, or as for ``recipe.initialize``.
    """
    settings = recipe.initialize_with
    if settings.method != "calibrate" or data is None:
        return recipe.initialize(model, original, say=say)
    images = open_images(data, "train", labeled=False)
    count = min(len(images), settings.num_images)
    chosen = images.subset(
        [index * len(images) // count for index in range(count)]
    )  # from all over: classes are sorted
    where = device or torch.device("cpu")
    loader = evaluation_loader(chosen, image_settings(original, input_size), settings.batch_size, device=where)
    try:
        return recipe.initialize(model.to(where), original.to(where), loader, say=say)
    finally:
        model.cpu()
        original.cpu()


_DEFAULT = "finetune"
Say = Callable[[str], None]


def open_trained(
    name: str,
    callable: str | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[str, nn.Module, ConvertedFolder | None]:
    """Opens the best model of a run, a converted folder, or any model that ``open_model`` opens.

    Args:
        name: What the user named.
        callable: ``package.module:callable`` that builds the user's own model before conversion.
        checkpoint: Weights of a model that is not in a folder.
        pretrained: Download timm's weights for such a model.
        arguments: Further arguments of ``timm.create_model`` for such a model.

    Returns:
        The name to show, the model in evaluation mode, and its folder if it is in one.

    Raises:
        UsageError: There is no such model, or an option does not apply to it.
        DDFError: The weights could not be downloaded.
    """
    folder = Path(name)
    if is_run(folder):
        folder = folder / BEST
    if (folder / MANIFEST).is_file():
        options = {"--checkpoint": checkpoint is not None, "--pretrained": pretrained}
        if given := [option for option, is_given in options.items() if is_given]:
            raise UsageError(f"{folder} holds its weights: leave {' and '.join(given)} out")
        if arguments:
            raise UsageError(f"{folder} says how its model is built: leave {', '.join(arguments)} out")
        converted = ConvertedFolder(folder, callable)
        return str(folder), converted.load().eval(), converted
    if callable is not None:
        what = "is none" if folder.exists() else "does not exist"
        raise UsageError(f"--model is for a converted folder, and {name} {what}")
    if folder.is_dir() and is_run(folder.parent):
        raise UsageError(f"{folder.parent} has no {folder.name}/ yet: its first evaluation was not reached")
    opened = open_model(name, True, pretrained, arguments)
    if checkpoint is not None:
        artifact.load_checkpoint(opened.model, checkpoint)
    return opened.name, opened.model, None


def choose_recipe(asked: str | os.PathLike[str] | None, folder: Path) -> Recipe:
    """The recipe asked for; without, the one that the model was converted with, if it trains; else ``finetune``.

    Raises:
        UsageError: There is no such recipe, or it has no stages.
        ArtifactError: The folder is not an artifact.
    """
    if asked is not None:
        recipe = recipes.load(asked)
        if not recipe.stages:
            raise UsageError(
                f"recipe {recipe.name} ends with the initialization, and has nothing to train: it is for"
                " `ddf-convert convert --recipe`; `ddf-convert recipes` names the others"
            )
        return recipe
    noted = artifact.read_manifest(folder).conversion.recipe
    if noted and noted.get("stages"):
        return Recipe.model_validate(noted)
    return recipes.load(_DEFAULT)


def replace_head(model: nn.Module, classes: int, seed: int) -> None:
    """Gives a model a new classifier, by its own ``reset_classifier``.

    Raises:
        UsageError: It has none.
    """
    reset = getattr(model, "reset_classifier", None)
    if not callable(reset):
        raise UsageError(
            f"--num-classes: {type(model).__name__} has no reset_classifier, as timm's models have; give it the"
            " classifier that you need before you convert it"
        )
    with seeded(seed_for(seed, 0, 0, 0, 0)):
        reset(classes)


def outputs(model: nn.Module, settings: ImageSettings, what: str = "the model") -> int | None:
    """How many classes a model tells apart, from a look at one empty image; None if its output is something else.

    Raises:
        UsageError: It does not take such an image.
        DDFError: Memory ran out.
    """
    first = next(model.parameters(), None)
    image = torch.zeros(1, *settings.input_size, device=first.device if first is not None else None)
    model.eval()
    try:
        with memory_explained(1), torch.no_grad():
            output = model(image)
    except DDFError:
        raise
    except Exception as error:
        size = " x ".join(map(str, settings.input_size))
        raise UsageError(
            f"{what} does not take images of {size} ({first_line(error)}); give --input-size C H W"
        ) from error
    return output.shape[1] if isinstance(output, Tensor) and output.ndim == 2 else None


def open_data(
    data: str,
    validation: str | None,
    recipe: Recipe,
    settings: ImageSettings,
    classes: int | None,
    on_broken: OnBroken,
    seed: int,
    say: Say,
) -> Data:
    """Images to train with and to evaluate on, which fit the model and each other.

    Labels are required if the recipe needs them. If it does not, those that are there and fit the model are used to
    evaluate.

    Args:
        data: As the user wrote it.
        validation: Other data to evaluate on; None is the validation part of ``data``, or a tenth held out.
        recipe: What is done with them.
        settings: Of images.
        classes: Of the model; None if it is no classifier.
        on_broken: What to do with images that cannot be read.
        seed: Of what is held out.
        say: Told what was found.

    Raises:
        UsageError: There are no such data, labels are missing, or they are not those of the model.
    """
    labelled = recipe.needs_labels
    training = _images(data, "train", labelled, classes, on_broken)
    if validation is not None:
        looked_at = _images(validation, "validation", labelled, classes, on_broken, whole=True)
        _check_classes_agree(training, looked_at, validation)
        where = validation
    else:
        try:
            looked_at = _images(data, "validation", labelled, classes, on_broken)
            where = f"its validation part, {len(looked_at)}"
        except MissingSplitError:
            training, looked_at = random_split(training, seed=seed)
            where = f"{len(looked_at)} of its images, held out"
    if not training.has_labels:
        labels = "without labels"
    else:
        labels = f"in {len(training.classes)} classes" if training.classes else "with labels"
    say(f"{data}: {len(training)} images {labels} to train with; to evaluate on: {where}")
    return Data(training, looked_at, settings, classes)


def check_stages(recipe: Recipe, model: nn.Module, data: Data, processes: Processes, seed: int) -> None:
    """Finds what would go wrong in a later stage before the first one has begun.

    Raises:
        UsageError: It says what, in which stage, and what to do.
    """
    norms = any(isinstance(module, _BatchNorm) for module in model.modules())
    for stage in recipe.stages:
        order_of(stage, len(data.training), processes, seed)
        make_transform(data.settings, stage.augmentation)
        trainable_names(model, stage.trainable)
        if stage.batch_size == 1 and norms and not stage.freeze_batch_norm:
            raise UsageError(
                f"stage {stage.name!r}: batch normalization cannot learn from batches of 1 image: give"
                " --batch-size 2 or more, or freeze_batch_norm: true in the recipe"
            )
        if stage.augmentation and stage.augmentation.mixes and stage.batch_size % 2:
            raise UsageError(
                f"stage {stage.name!r}: mixup and CutMix mix pairs of images: --batch-size {stage.batch_size} is odd"
            )


def check_outputs(recipe: Recipe, classes: int | None, teacher_classes: int | None) -> None:
    """Whether the outputs of the model and the original are what the losses look at.

    Raises:
        UsageError: They are not.
    """
    for stage in recipe.stages:
        losses = stage.losses
        if classes is None and (losses.needs_labels or losses.logits):
            raise UsageError(
                f"stage {stage.name!r}: its task and logits losses need class scores (images, classes), which the"
                " model does not return; a recipe with features: alone trains it"
            )
        if losses.logits and classes != teacher_classes:
            raise UsageError(
                f"stage {stage.name!r} learns the original's class probabilities, of {teacher_classes} classes, and the"
                f" model has {classes}: take a recipe with logits: 0, or leave --num-classes out"
            )


def announce_precision(stages: tuple[Stage, ...], device: torch.device, say: Say) -> None:
    """Tells of a dtype that the device is not for."""
    if device.type == "cpu" and any(stage.amp == "float16" for stage in stages):
        say("float16 is for GPUs: on the CPU this recipe trains in float32")


def _images(
    data: str, split: Split, needed: bool, classes: int | None, on_broken: OnBroken, whole: bool = False
) -> ImageDataset:
    if not needed:
        with contextlib.suppress(UsageError):
            found = open_images(data, split, True, on_broken, whole)
            if found.classes is not None and len(found.classes) == classes:
                return found
        return open_images(data, split, False, on_broken, whole)
    found = open_images(data, split, True, on_broken, whole)
    if found.classes is not None and classes is not None and len(found.classes) != classes:
        raise UsageError(
            f"{data} has {len(found.classes)} classes and the model {classes}: --num-classes {len(found.classes)} gives"
            " it a new classifier"
        )
    return found


def _check_classes_agree(training: ImageDataset, validation: ImageDataset, name: str) -> None:
    if training.classes and validation.classes and training.classes != validation.classes:
        mine, theirs = (set(each.classes or ()) for each in (training, validation))
        odd = sorted(mine ^ theirs)[:1]
        raise UsageError(
            f"{name}: its classes are not those of --data"
            + (f": {odd[0]} is in one of them only" if odd else ", or in another order")
        )
