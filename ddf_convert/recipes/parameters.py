"""Which parameters a stage trains, and how its optimizer treats them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddf_convert.conversion.record import recorded
from ddf_convert.conversion.registry import replacing_layers
from ddf_convert.errors import UsageError
from ddf_convert.recipes.schema import Stage
from ddf_convert.utils.patterns import matching_names, pattern_hint

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # timm's are among them


def new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that replaced convolutions and upsampling, by name, in the order of the module tree."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    kinds, conversion = replacing_layers(), recorded(model)
    # Models that were built with new layers have no record; a plain depthwise convolution is new by its record alone.
    places = {place for step in (conversion.replaced if conversion else ()) for place in step.places}
    for name, module in model.named_modules():
        if (isinstance(module, kinds) or name in places) and module not in inside:
            found[name] = module
            inside.update(module.modules())
    return found


def trainable_names(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the parameters that patterns of ``Stage.trainable`` select; a pattern without any is an error."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    chosen: set[str] = set()
    for pattern in patterns:
        matching = _matching(model, names, pattern)
        if not matching and not (pattern == "norms" and len(patterns) > 1):  # recipes train them where there are any
            raise UsageError(
                f"trainable: {pattern!r} matches no parameter of {type(model).__name__}{_hint(pattern, names)}"
            )
        chosen |= matching
    return chosen


def parameter_groups(model: nn.Module, stage: Stage, images_per_step: int | None = None) -> list[dict[str, Any]]:
    """Freezes all parameters but those that the stage trains, and groups these: see ``Recipe.parameter_groups``."""
    chosen = trainable_names(model, stage.trainable)
    new = {id(parameter) for layer in new_layers(model).values() for parameter in layer.parameters()}
    no_weight_decay = getattr(model, "no_weight_decay", None)  # timm's models list position embeddings, tokens, ...
    undecayed: set[str] = set(no_weight_decay()) if callable(no_weight_decay) else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    aliases = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in chosen}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in aliases and parameter.is_floating_point())
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in undecayed
            groups.setdefault((id(parameter) in new, decays), []).append(parameter)
    optimizer = stage.optimizer
    lr = learning_rate(stage, images_per_step)
    return [
        {
            "params": parameters,
            "lr": lr if is_new else lr * optimizer.old_lr_scale,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "name": f"{'new' if is_new else 'old'}, {'with' if decays else 'without'} weight decay",
        }
        for (is_new, decays), parameters in groups.items()
    ]


def learning_rate(stage: Stage, images_per_step: int | None = None) -> float:
    """The learning rate of the new layers."""
    optimizer = stage.optimizer
    if optimizer.lr_base_size is None or images_per_step is None:
        return optimizer.lr
    return optimizer.lr * images_per_step / optimizer.lr_base_size


def _matching(model: nn.Module, names: list[str], pattern: str) -> set[str]:
    if pattern == "all":
        return set(names)
    if pattern == "new":
        return _parameters_of(names, new_layers(model))
    if pattern == "norms":
        return _parameters_of(names, (name for name, module in model.named_modules() if isinstance(module, _NORMS)))
    if pattern == "head":
        classifier = head(model)
        return _parameters_of(names, (name for name, module in model.named_modules() if module is classifier))
    return matching_names("trainable", pattern, names)


def head(model: nn.Module) -> nn.Module | None:
    """The classifier: timm's ``get_classifier()``, or the last linear layer."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else None
    if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
        return found
    return next((module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)), None)


def _parameters_of(names: Iterable[str], modules: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{module}." for module in modules)
    return {name for name in names if name.startswith(prefixes)}


def _hint(pattern: str, names: list[str]) -> str:
    if pattern in ("new", "norms", "head"):
        what = {"new": "DDF layers", "norms": "normalizations", "head": "classifier"}[pattern]
        return f": it has no {what}"
    return pattern_hint(pattern, [*names, "all", "new", "norms", "head"])
