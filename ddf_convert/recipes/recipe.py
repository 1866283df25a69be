"""A recipe as a whole, and what can be done with it in anyone's own loop."""

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
from ddf_convert.recipes.schema import ConversionPart, Initialize, Part, Stage
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.modules import bare


class Recipe(Part):
    """A way to convert a model and to bring it back.

    Attributes:
        name: What it is called.
        description: One sentence: what it is for.
        conversion: How to convert.
        initialize_with: What the new layers start from; ``initialize`` in a file.
        stages: Of fine-tuning, in order; none if the recipe ends with the initialization.
    """

    name: str = Field(min_length=1)
    description: str = ""
    conversion: ConversionPart = ConversionPart()
    initialize_with: Initialize = Field(
        default=Initialize(),
        validation_alias=AliasChoices("initialize", "initialise"),  # the second: recipes of earlier versions
        serialization_alias="initialize",
    )
    stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Recipe:
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
        """Whether any stage looks at labels."""
        return any(stage.losses.needs_labels for stage in self.stages)

    @property
    def needs_teacher(self) -> bool:
        """Whether any stage looks at the original model."""
        return any(stage.losses.needs_teacher for stage in self.stages)

    def to_yaml(self) -> str:
        """The recipe as a file, with every value spelt out."""
        return str(
            yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, width=100, allow_unicode=True)
        )

    def changed(self, **settings: Any) -> Recipe:
        """The recipe with the same settings changed in every stage; those that are None stay.

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
        """The conversion as keyword arguments of ``plan`` and ``convert``."""
        return {name: value for name, value in self.conversion.model_dump().items() if value not in (None, ())}

    def convert(self, model: nn.Module, example_input: ExampleInput, **options: Any) -> nn.Module:
        """A converted copy of a model, as the recipe wants it; :meth:`initialize` comes next.

        Args:
            model: Any model.
            example_input: As for ``ddf_convert.plan``.
            **options: Of ``ddf_convert.plan``; they win over the recipe's.

        Raises:
            UsageError: As for ``ddf_convert.convert``.
        """
        return convert(model, example_input=example_input, **{**self.options(), **options})

    def initialize(
        self, model: nn.Module, original: nn.Module | None = None, images: Iterable[Any] | None = None, **options: Any
    ) -> Initialized:
        """Gives the new layers of a converted model the weights that they start from, in place.

        Args:
            model: The converted model.
            original: The model before conversion, with its weights; not needed by the method "paper".
            images: Batches (B, C, H, W), or tuples that begin with one; needed by the method "calibrate".
            **options: Fields of ``Initialize``, which win over the recipe's; and ``say``, a function that is told what
                is being done.

        Returns:
            What was done, with a relative error for each layer.

        Raises:
            UsageError: Something that the method needs is missing, or the original is another model.
        """
        say = options.pop("say", None) or (lambda words: None)
        settings = Initialize.model_validate({**self.initialize_with.model_dump(), **options})
        done = initialize(model, settings, original, images, say)
        record(model, self)
        return done

    initialise = initialize  # the name in earlier versions

    def parameter_groups(
        self, model: nn.Module, stage: Stage | str | int = 0, images_per_step: int | None = None
    ) -> list[dict[str, Any]]:
        """Lets a stage's parameters learn, and nothing else, and groups them for an optimizer.

        Args:
            model: A converted model.
            stage: The stage, its name or its number.
            images_per_step: Images of all processes and accumulated batches; scales the learning rate where the stage
                says for how many it is meant.

        Returns:
            Groups with ``params``, ``lr``, ``weight_decay`` and ``name``.

        Raises:
            UsageError: There is no such stage, or it names parameters that the model does not have.
        """
        return parameter_groups(model, self.stage(stage), images_per_step)

    def losses(self, model: nn.Module, stage: Stage | str | int = 0, teacher: nn.Module | None = None) -> Objective:
        """What a stage minimizes, as a module: ``objective(images, targets)["loss"]``.

        Args:
            model: A converted model.
            stage: The stage, its name or its number.
            teacher: The original model, for stages that learn from it.

        Raises:
            UsageError: There is no such stage, or the teacher is missing.
        """
        return Objective(model, self.stage(stage).losses, teacher)

    def stage(self, which: Stage | str | int) -> Stage:
        """A stage by name or number.

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
    """Notes the recipe in a converted model's record, so that it is saved with it."""
    conversion = recorded(model)
    if conversion is not None:
        data = recipe.model_dump(mode="json", by_alias=True)
        bare(model).ddf_conversion = conversion.model_copy(update={"recipe": data})  # type: ignore[assignment]
