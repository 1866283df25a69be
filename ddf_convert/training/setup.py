"""What a run needs, opened and checked against each other before anything is trained."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_convert import recipes
from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.atomic import MANIFEST, FileRecord
from ddf_convert.artifacts.source import ConvertedFolder, open_model
from ddf_convert.errors import DDFError, UsageError, first_line, in_one_line
from ddf_convert.recipes import Initialized, Recipe
from ddf_convert.recipes.parameters import trainable_names
from ddf_convert.training import fingerprint, resume
from ddf_convert.training.dataloader import ImageSettings, evaluation_loader, image_settings, make_transform
from ddf_convert.training.dataset import ImageDataset, MissingSplitError, OnBroken, Split, open_images, random_split
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.distributed import Processes
from ddf_convert.training.finetuner import TrainingData, order_of
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.run_dir import BEST, RunRecord, is_run
from ddf_convert.training.sampler import seed_for, seeded
from ddf_convert.training.trainer import TrainingOptions
from ddf_convert.version import __version__

_DEFAULT_RECIPE = "finetune"
Say = Callable[[str], None]


@dataclass(frozen=True)
class FinetuneRequest:
    """What to fine-tune, with what, and where to."""

    folder: Path  # a converted model
    data: str  # to train with; see ddf_convert.training.dataset
    output: Path  # folder of the run
    validation: str | None = None  # None: the validation part of data, or a tenth of it
    recipe: str | None = None  # a name or a file; None: the one used to convert, or finetune
    changes: dict[str, Any] = field(default_factory=dict)  # of every stage, see Recipe.changed
    resume: bool = False
    model: str | None = None  # package.module:callable that builds the user's own model before conversion
    teacher_checkpoint: Path | None = None  # weights of the original model; None: those in folder
    classes: int | None = None  # of a new classifier
    input_size: tuple[int, int, int] | None = None  # (C, H, W); None: the model's
    device: str | None = None  # cpu, cuda or cuda:N; None: the GPU if there is one
    on_broken: OnBroken = "stop"
    options: TrainingOptions = field(default_factory=TrainingOptions)


@dataclass(frozen=True)
class Prepared:
    """What a run trains with; models are on the device."""

    recipe: Recipe
    model: nn.Module  # on the device
    teacher: nn.Module | None  # the original model, on the device, if the recipe learns from it
    data: TrainingData


def prepare(request: FinetuneRequest, processes: Processes, say: Say) -> Prepared:
    """Opens everything that a run needs, and finds out what does not fit."""
    options = request.options
    recipe = change_recipe(choose_recipe(request.recipe, request.folder), request.changes, processes.device)
    source = ConvertedFolder(request.folder, request.model)
    model = source.load().float()
    if request.classes is not None:
        replace_head(model, request.classes, options.seed)
    settings = image_settings(model, request.input_size)
    model = _to_device(model, processes, options)
    classes = count_classes(model, settings)
    teacher = _open_teacher(request, recipe, source, processes)
    check_outputs(recipe, classes, count_classes(teacher, settings, "the original") if teacher else None)
    data = open_data(request, recipe, settings, classes, say)
    check_stages(recipe, model, data, processes, options.seed)
    if processes.device.type == "cpu" and any(stage.amp == "float16" for stage in recipe.stages):
        say("float16 is for GPUs: on the CPU this recipe trains in float32")
    return Prepared(recipe, model, teacher, data)


def describe(request: FinetuneRequest, prepared: Prepared, processes: Processes) -> tuple[RunRecord, list[Entry]]:
    """Returns what a run is asked for, all that decides its result, and what its images are."""
    recipe, model, data, options = prepared.recipe, prepared.model, prepared.data, request.options
    manifest = artifact.read_manifest(request.folder)
    teacher = manifest.original if request.teacher_checkpoint is None else FileRecord.of(request.teacher_checkpoint)
    entries = fingerprint.of_images(data.training, "training") + fingerprint.of_images(data.validation, "validation")
    settings = {
        "versions": {"ddf_convert": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "folder": str(request.folder),
        "weights": manifest.weights.sha256,
        resume.ARCHITECTURE: resume.architecture(model),
        "model": request.model,
        "teacher": None if request.teacher_checkpoint is None else str(request.teacher_checkpoint),
        "teacher_weights": teacher.sha256 if teacher is not None and recipe.needs_teacher else None,
        "data": request.data,
        "images": len(data.training),
        "validation": request.validation,
        "validation_images": len(data.validation),
        resume.DATA: fingerprint.digest(entries),
        "labelled": data.validation.has_labels,
        "classes": data.classes,
        resume.CLASS_NAMES: None if data.training.classes is None else list(data.training.classes),
        "input_size": list(data.settings.input_size),
        "preparation": json.loads(json.dumps(asdict(data.settings))),
        "on_broken": request.on_broken,
        "seed": options.seed,
        "world": processes.world,
        "device": str(processes.device),
        "workers": options.workers,
        "channels_last": options.channels_last,
        "compile": options.compiled,
        resume.ENVIRONMENT: resume.environment(processes.device, processes.world),
    }
    return RunRecord(recipe, settings), entries


# --- models ---


def open_trained(
    name: str,
    callable: str | None = None,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[str, nn.Module, ConvertedFolder | None]:
    """Opens the best model of a run, a converted folder, or any model that ``open_model`` opens.

    Returns the name to show, the model in evaluation mode, and its folder if it is in one. ``callable`` builds the
    user's own model before conversion; ``checkpoint`` and ``arguments`` are for models that are not in a folder.
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


def choose_recipe(name: str | os.PathLike[str] | None, folder: Path) -> Recipe:
    """Returns the recipe asked for, else the one that the model was converted with if it trains, else ``finetune``."""
    if name is not None:
        recipe = recipes.load(name)
        if not recipe.stages:
            raise UsageError(
                f"recipe {recipe.name} ends with the initialization, and has nothing to train: it is for"
                " `ddf-convert convert --recipe`; `ddf-convert recipes` names the others"
            )
        return recipe
    noted = artifact.read_manifest(folder).conversion.recipe
    if noted and noted.get("stages"):
        return Recipe.model_validate(noted)
    return recipes.load(_DEFAULT_RECIPE)


def change_recipe(recipe: Recipe, changes: Mapping[str, Any], device: torch.device) -> Recipe:
    """Returns a recipe with changes in every stage; those that are None change nothing."""
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("amp") == "float16" and device.type == "cpu":
        raise UsageError("--amp float16 is for GPUs: give bfloat16, or none")
    if given.get("amp") == "none":
        del given["amp"]
        stages = tuple(stage.model_copy(update={"amp": None}) for stage in recipe.stages)
        recipe = recipe.model_copy(update={"stages": stages})
    try:
        return recipe.changed(**given)
    except ValidationError as error:
        raise UsageError(f"recipe {recipe.name}, changed by options: {in_one_line(error)}") from error


def replace_head(model: nn.Module, classes: int, seed: int) -> None:
    """Gives a model a new classifier by its own ``reset_classifier``."""
    reset = getattr(model, "reset_classifier", None)
    if not callable(reset):
        raise UsageError(
            f"--num-classes: {type(model).__name__} has no reset_classifier, as timm's models have; give it the"
            " classifier that you need before you convert it"
        )
    with seeded(seed_for(seed, 0, 0, 0, 0)):
        reset(classes)


def count_classes(model: nn.Module, settings: ImageSettings, what: str = "the model") -> int | None:
    """Returns the number of a model's classes, from a run on an empty image; None if its output is something else."""
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


def _open_teacher(
    request: FinetuneRequest, recipe: Recipe, source: ConvertedFolder, processes: Processes
) -> nn.Module | None:
    if not recipe.needs_teacher:
        if request.teacher_checkpoint is not None:
            raise UsageError(f"--teacher-checkpoint: recipe {recipe.name} does not learn from the original model")
        return None
    teacher = source.load_original(request.teacher_checkpoint)
    if teacher is None:
        raise UsageError(
            f"recipe {recipe.name} learns from the original model, whose weights {request.folder} does not keep:"
            " convert with --recipe distill (or the like), or give them with --teacher-checkpoint FILE"
        )
    return _to_device(teacher.float(), processes, request.options).requires_grad_(False)


def _to_device(model: nn.Module, processes: Processes, options: TrainingOptions) -> nn.Module:
    moved: nn.Module = model.to(processes.device).to(memory_format=options.memory_format)
    return moved


def initialize(
    recipe: Recipe,
    model: nn.Module,
    original: nn.Module,
    data: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
    say: Say = lambda words: None,
) -> Initialized:
    """Initializes a converted model as ``recipe.initialize`` does, with images named on the command line."""
    settings = recipe.initialize_with
    if settings.method != "calibrate" or data is None:
        return recipe.initialize(model, original, say=say)
    images = open_images(data, "train", labeled=False)
    count = min(len(images), settings.num_images)
    chosen = images.subset([index * len(images) // count for index in range(count)])  # spaced: classes are sorted
    where = device or torch.device("cpu")
    loader = evaluation_loader(chosen, image_settings(original, input_size), settings.batch_size, device=where)
    try:
        return recipe.initialize(model.to(where), original.to(where), loader, say=say)
    finally:
        model.cpu()
        original.cpu()


# --- data ---


def open_data(
    request: FinetuneRequest, recipe: Recipe, settings: ImageSettings, classes: int | None, say: Say
) -> TrainingData:
    """Opens images to train with and to evaluate on, which fit the model and each other.

    Labels are required if the recipe needs them. If it does not, those that are there and fit the model are used to
    evaluate.
    """
    name, labelled, on_broken = request.data, recipe.needs_labels, request.on_broken
    training = _open_part(name, "train", labelled, classes, on_broken)
    if request.validation is not None:
        validation = _open_part(request.validation, "validation", labelled, classes, on_broken, undivided=True)
        _check_classes_agree(training, validation, request.validation)
        where = request.validation
    else:
        try:
            validation = _open_part(name, "validation", labelled, classes, on_broken)
            where = f"its validation part, {len(validation)}"
        except MissingSplitError:
            training, validation = random_split(training, seed=request.options.seed)
            where = f"{len(validation)} of its images, held out"
    if not training.has_labels:
        labels = "without labels"
    else:
        labels = f"in {len(training.classes)} classes" if training.classes else "with labels"
    say(f"{name}: {len(training)} images {labels} to train with; to evaluate on: {where}")
    return TrainingData(training, validation, settings, classes)


def _open_part(
    data: str, split: Split, needed: bool, classes: int | None, on_broken: OnBroken, undivided: bool = False
) -> ImageDataset:
    if not needed:
        with contextlib.suppress(UsageError):
            found = open_images(data, split, True, on_broken, undivided)
            if found.classes is not None and len(found.classes) == classes:
                return found
        return open_images(data, split, False, on_broken, undivided)
    found = open_images(data, split, True, on_broken, undivided)
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


# --- checks ---


def check_stages(recipe: Recipe, model: nn.Module, data: TrainingData, processes: Processes, seed: int) -> None:
    """Checks all stages before the first one begins."""
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
    """Checks that the outputs of the model and the original are what the losses need."""
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
