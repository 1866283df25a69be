"""A recipe, and what it does in a training loop: convert, initialize, parameter groups, losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import AliasChoices, Field, model_validator
from torch import nn

from ddf_convert.conversion.convert import convert
from ddf_convert.conversion.record import recorded
from ddf_convert.conversion.registry import DDF
from ddf_convert.errors import UsageError
from ddf_convert.recipes.initialize import Initialized, initialize
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.parameters import parameter_groups
from ddf_convert.recipes.schema import Initialize, RecipeConversion, RecipePart, Stage
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.modules import bare


class Recipe(RecipePart):
    """How to convert a model, what its new layers start from, and how it is fine-tuned."""

    name: str = Field(min_length=1, description="Name of the recipe.")
    description: str = Field(default="", description="One sentence: what it is for.")
    conversion: RecipeConversion = Field(default=RecipeConversion(), description="How to convert.")
    initialize_with: Initialize = Field(
        default=Initialize(),
        validation_alias=AliasChoices("initialize", "initialise"),  # the second is the key of earlier versions
        serialization_alias="initialize",
        description="What the new layers start from; the key of a file is ``initialize``.",
    )
    stages: tuple[Stage, ...] = Field(
        default=(), description="Stages of fine-tuning, in order; none if the recipe ends with the initialization."
    )

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.initialize_with.method != "paper" and not self.conversion.affine:
            raise ValueError(
                f"initialize.method {self.initialize_with.method!r} starts from the old weights, which needs"
                " conversion.affine: true"
            )
        if self.initialize_with.method != "paper" and self.conversion.filter != DDF:
            raise ValueError(
                f"initialize.method {self.initialize_with.method!r} is for DDF, and conversion.filter is"
                f" {self.conversion.filter!r}"
            )
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two stages are called {twice!r}")
        return self

    @property
    def needs_labels(self) -> bool:
        """Whether any stage needs labels."""
        return any(stage.losses.needs_labels for stage in self.stages)

    @property
    def needs_teacher(self) -> bool:
        """Whether any stage needs the original model."""
        return any(stage.losses.needs_teacher for stage in self.stages)

    def to_yaml(self) -> str:
        """Returns the recipe as the text of a file, with every value."""
        return str(
            yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, width=100, allow_unicode=True)
        )

    def changed(self, **settings: Any) -> Recipe:
        """Returns a copy with some settings changed in every stage; None leaves a setting as it is.

        Args:
            **settings: ``epochs``, ``steps``, ``batch_size``, ``accumulate``, ``amp``, ``ema_decay``, ``lr``, ``opt``.

        Raises:
            ValueError: A value does not fit (pydantic's ``ValidationError``).
        """
        given = {name: value for name, value in settings.items() if value is not None}
        content = self.model_dump(by_alias=True)
        for stage in content["stages"]:
            for name, value in given.items():
                if name in ("lr", "opt"):
                    stage["optimizer"][name] = value
                else:
                    stage[name] = value
            if "steps" in given and "epochs" not in given:
                stage["epochs"] = None
                stage["schedule"].update(warmup_epochs=0, warmup_steps=stage["steps"] // 10)
            elif "epochs" in given:
                stage["steps"] = None
                stage["schedule"]["warmup_steps"] = 0
                stage["schedule"]["warmup_epochs"] = min(stage["schedule"]["warmup_epochs"], given["epochs"] / 2)
        return Recipe.model_validate(content)

    def options(self) -> dict[str, Any]:
        """Returns the conversion as keyword arguments of ``plan`` and ``convert``."""
        return {name: value for name, value in self.conversion.model_dump().items() if value not in (None, ())}

    def convert(self, model: nn.Module, example_input: ExampleInput, **options: Any) -> nn.Module:
        """Returns a converted copy of a model, whose new layers are then to be initialized by :meth:`initialize`.

        Args:
            model: The model.
            example_input: An input of its forward, as in ``ddf_convert.plan``.
            **options: Of ``ddf_convert.plan``; they override the recipe's.

        Raises:
            UsageError: The model cannot be converted with these options, as in ``ddf_convert.convert``.
        """
        return convert(model, example_input=example_input, **{**self.options(), **options})

    def initialize(
        self, model: nn.Module, original: nn.Module | None = None, images: Iterable[Any] | None = None, **options: Any
    ) -> Initialized:
        """Initializes the new layers of a converted model, in place.

        Args:
            model: The converted model.
            original: The model before conversion, with its weights; not needed by the method "paper".
            images: Batches (B, C, H, W), or tuples that begin with one; needed by the method "calibrate".
            **options: Fields of ``initialize_with`` that override the recipe's; and ``say``, a function that is called
                with lines of progress.

        Returns:
            The method, and a relative error for each layer.

        Raises:
            UsageError: Something that the method needs is missing, or the original is another model. The model is then
                unchanged.
            DDFError: The fit gave numbers that are not finite.
        """
        say = options.pop("say", None) or (lambda words: None)
        settings = Initialize.model_validate({**self.initialize_with.model_dump(), **options})
        done = initialize(model, settings, original, images, say)
        record(model, self)
        return done

    # The names in earlier versions.
    initialise = initialize
    initialise_with = property(lambda self: self.initialize_with)

    def parameter_groups(
        self, model: nn.Module, stage: Stage | str | int = 0, images_per_step: int | None = None
    ) -> list[dict[str, Any]]:
        """Freezes all parameters but those that a stage trains, and groups these for an optimizer.

        Args:
            model: A converted model.
            stage: The stage, its name or its number.
            images_per_step: Images of all processes and accumulated batches; scales the learning rate if the stage has
                ``lr_base_size``.

        Returns:
            Groups with ``params``, ``lr``, ``weight_decay`` and a ``name``, for torch's and timm's optimizers: new
            layers and old ones, each with and without weight decay (biases, norms and FilterNorm's scales and shifts
            have none). Empty groups are left out.

        Raises:
            UsageError: There is no such stage, or it names parameters that the model does not have.
        """
        return parameter_groups(model, self.stage(stage), images_per_step)

    def losses(self, model: nn.Module, stage: Stage | str | int = 0, teacher: nn.Module | None = None) -> Objective:
        """Returns the losses of a stage as a module: ``objective(images, targets)["loss"]``.

        Args:
            model: A converted model.
            stage: The stage, its name or its number.
            teacher: The original model, for stages that learn from it.

        Raises:
            UsageError: There is no such stage, or the teacher is missing.
        """
        return Objective(model, self.stage(stage).losses, teacher)

    def stage(self, which: Stage | str | int) -> Stage:
        """Returns a stage by name or number.

        Raises:
            UsageError: There is none.
        """
        if isinstance(which, Stage):
            return which
        for number, stage in enumerate(self.stages):
            if which in (number, stage.name):
                return stage
        known = ", ".join(repr(stage.name) for stage in self.stages) or "none: it ends with the initialization"
        raise UsageError(f"recipe {self.name} has no stage {which!r}; it has {known}")


def record(model: nn.Module, recipe: Recipe) -> None:
    """Adds the recipe to a converted model's record, with which it is saved."""
    conversion = recorded(model)
    if conversion is not None:
        data = recipe.model_dump(mode="json", by_alias=True)
        bare(model).ddf_conversion = conversion.model_copy(update={"recipe": data})  # type: ignore[assignment]
