"""Where a model comes from: timm, if timm provably builds the same network, or its user."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import timm.layers
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from torch import fx, nn

from ddf_convert.artifacts.checkpoint import describe_difference, state_of
from ddf_convert.artifacts.module_diff import Difference, Differences, differences
from ddf_convert.conversion.interpolate_hook import class_of
from ddf_convert.conversion.record import Conversion
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.errors import UsageError, first_line, in_one_line
from ddf_convert.utils.fake_copy import real_copy
from ddf_convert.utils.modules import model_name

# Arguments of timm.create_model that make it read or fetch files: an artifact never carries them.
_READING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}
_MOST_BUILDS = 12  # of a search for arguments; each takes a fraction of a second
_FEATURE_CLASSES = {
    "FeatureListNet": "list",
    "FeatureDictNet": "dict",
    "FeatureHookNet": "hook",
    "FeatureGetterNet": "getter",
    "FeatureGraphNet": "fx",
}
# Arguments that set the dropout of modules with these names.
_DROPOUTS = {
    "attn_drop": "attn_drop_rate",
    "head_drop": "drop_rate",
    "pos_drop": "pos_drop_rate",
    "proj_drop": "proj_drop_rate",
}
# Arguments that set these attributes somewhere inside a model.
_SAME_VALUE = {
    "pool_type": ("global_pool",),
    "img_size": ("img_size",),
    "eps": ("norm_eps", "bn_eps"),
    "momentum": ("bn_momentum",),
}
_ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "silu", "mish", "gelu", "gelu_tanh", "quick_gelu"),
    *("hard_swish", "hard_sigmoid", "hard_mish", "sigmoid", "tanh"),
)


class TimmSource(BaseModel):
    """A model that timm can build: ``timm.create_model(name, pretrained=False, **kwargs)``.

    Args:
        name: timm's name of the model, with or without the tag of its weights.
        kwargs: Further arguments of ``timm.create_model``: numbers, texts, booleans, None, and lists or dicts of them.

    Raises:
        UsageError: A name or an argument is something else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["timm"] = "timm"
    name: str
    kwargs: dict[str, JsonValue] = {}

    def __init__(self, *args: Any, **fields: Any) -> None:
        try:
            super().__init__(**dict(zip(("name", "kwargs"), args, strict=False)), **fields)
        except ValidationError as error:
            raise UsageError(f"TimmSource: {in_one_line(error)}") from error

    @field_validator("kwargs", mode="before")
    @classmethod
    def _only_json(cls, kwargs: Any) -> Any:
        if not isinstance(kwargs, Mapping):
            return kwargs
        for name, value in kwargs.items():
            if not isinstance(name, str) or not _is_json(value):
                raise ValueError(f"{name} is {type(value).__name__}, which JSON does not have")
        return {name: json.loads(json.dumps(value)) for name, value in kwargs.items()}  # tuples become lists


class OwnSource(BaseModel):
    """A model of the user's own: it is built by the user and filled by ``restore``.

    Attributes:
        model_class: Module and name of its class, to recognize it by; never imported.
        reason: Why it is not timm's, if timm has a model of its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["own"] = "own"
    model_class: str = Field(alias="class")
    reason: str = ""


def find_source(
    model: nn.Module, conversion: Conversion, asked: TimmSource | str | None = None
) -> TimmSource | OwnSource:
    """The source of a converted model.

    timm is the source only if what it builds, converted, is the same network: names and shapes of the weights, and
    everything that ``module_diff.differences`` compares. If some of that cannot be compared, both also
    have to give the same outputs. timm's arguments are those that timm noted in the model, or are looked for.

    Args:
        model: The converted model, without wrappers.
        conversion: Its record.
        asked: The source that the user gave: a timm name, for which arguments are looked for, or name and arguments.

    Raises:
        UsageError: The source that was asked for builds another network.
    """
    # A GraphModule is a class of its own each time: the name of what it was made of says more.
    graph = isinstance(model, fx.GraphModule)
    described = conversion.source if graph else model_name(model)
    given = asked if isinstance(asked, TimmSource) else None
    name = given.name if given else str(asked or described)
    known = timm.is_model(name)
    reason = f"timm has no model {name!r}"
    if known:
        trial = _try(model, conversion, given) if given else _search(model, conversion, _tagged(model, name))
        if not trial.reason:
            return trial.source
        reason = trial.reason
    if asked is not None:
        raise UsageError(f"the model cannot be saved as timm's {name}: {reason}")
    kind = class_of(model)
    fields = {"class": described if graph else f"{kind.__module__}.{kind.__qualname__}"}
    return OwnSource.model_validate({**fields, "reason": reason if known else ""})


def built_by_timm(source: TimmSource, device: str) -> nn.Module:
    """A fresh model from timm; nothing is downloaded or read, and torch's random state stays as it is.

    Raises:
        UsageError: timm has no such model, or cannot build it with these arguments.
    """
    if not timm.is_model(source.name):
        raise UsageError(f"timm {timm.__version__} has no model {source.name!r}")
    reading = [name for name in source.kwargs if name in _READING]
    if reading:
        raise UsageError(f"{reading[0]} is not an argument that an artifact may give to timm")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            arguments: dict[str, Any] = dict(source.kwargs)
            return timm.create_model(source.name, pretrained=False, **arguments)
    except UsageError:  # it becomes too large, on any device
        raise
    except Exception as error:
        if device == "meta":  # some models look at values while they are built
            return built_by_timm(source, "cpu")
        raise UsageError(f"timm {timm.__version__} cannot build {source.name}: {first_line(error)}") from error


# --- the proof that timm builds the same network ---


@dataclass(frozen=True)
class _Trial:
    """What timm builds from a source, converted, beside the model.

    Attributes:
        source: The source.
        reason: Why the two are not the same network; "" if they are.
        found: What they differ in, beside names and shapes of the weights.
        distance: The number of differences in all.
    """

    source: TimmSource
    reason: str
    found: tuple[Difference, ...] = ()
    distance: float = float("inf")


def _try(model: nn.Module, conversion: Conversion, source: TimmSource) -> _Trial:
    try:
        built = _converted(source, conversion, "meta")
    except UsageError as error:
        return _Trial(source, str(error))
    mine, theirs = state_of(model, extra_states=False), state_of(built, extra_states=False)
    unequal = sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})
    compared = differences(model, built)
    if not unequal and not compared.found and (compared.without_values or compared.undecided):
        built = _converted(source, conversion, "cpu")
        compared = differences(model, built)
    reason = (
        describe_difference(theirs, mine) or _first_in_words(compared) or _unlike_in_outputs(model, built, compared)
    )
    return _Trial(source, reason, tuple(compared.found), unequal + len(compared.found))


def _converted(source: TimmSource, conversion: Conversion, device: str) -> nn.Module:
    built = built_by_timm(source, device)
    return apply_replacements(built, conversion.replaced)


def _first_in_words(compared: Differences) -> str:
    if not compared.found:
        return ""
    first = compared.found[0]
    mine, theirs = first.values()
    return f"it has {first.name or 'the class'} {mine} where timm builds {theirs}"


def _unlike_in_outputs(model: nn.Module, built: nn.Module, compared: Differences) -> str:
    """Why the outputs for equal weights are not known to be equal; only what cannot be compared makes the two run."""
    open_questions = [*compared.undecided, *compared.without_values]
    if not open_questions:
        return ""
    like = next(iter(model.parameters()), torch.empty(0))
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    try:
        built.to(like.device, like.dtype).load_state_dict(model.state_dict())
        image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)).to(like.dtype)
        outputs = []
        for copied in (real_copy(each, (image,)) for each in (model, built)):
            with copied.running(), torch.no_grad():
                outputs.append(copied.run())
        torch.testing.assert_close(*outputs)
    except Exception as error:  # both run the code of others
        return f"{open_questions[0]} cannot be compared with what timm builds ({first_line(error)})"
    return ""


# --- the arguments that timm was given ---


def _search(model: nn.Module, conversion: Conversion, name: str) -> _Trial:
    """The nearest that timm comes to a model: with the arguments that it noted, then with one more at a time."""
    tried: list[TimmSource] = []
    best = None
    sources = iter(_first_guesses(model, name))
    while len(tried) < _MOST_BUILDS:
        source = next((each for each in sources if each not in tried), None)
        if source is None:
            break
        tried.append(source)
        trial = _try(model, conversion, source)
        if best is None or not trial.reason or trial.distance < best.distance:
            best = trial
            sources = itertools.chain(sources if len(tried) == 1 else (), _refined(model, best))
        if not best.reason:
            break
    assert best is not None
    return best


def _first_guesses(model: nn.Module, name: str) -> Iterator[TimmSource]:
    """Sources with the arguments that timm noted, if it did, and with none; both with the model's present sizes."""
    noted: dict[str, Any] = getattr(model, "_model_args", {})
    noted = {key: value for key, value in noted.items() if _is_json(value) and key not in _READING}
    configuration = getattr(model, "pretrained_cfg", None) or {}
    first, modules = configuration.get("first_conv"), dict(model.named_modules())
    channels = getattr(modules.get(first), "in_channels", 3) if isinstance(first, str) else 3
    for arguments in (noted, {}):
        sizes = {}
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and classes != arguments.get("num_classes", configuration.get("num_classes")):
            sizes["num_classes"] = classes
        # Either the image has so many channels, or the model folds pixels into channels before its first convolution.
        if channels != arguments.get("in_chans", 3):
            yield TimmSource(name, {**arguments, **sizes, "in_chans": channels})
        yield TimmSource(name, {**arguments, **sizes})


def _refined(model: nn.Module, trial: _Trial) -> Iterator[TimmSource]:
    """The source of a trial with one argument more: each that can explain a difference."""
    for difference in trial.found:
        for arguments in _arguments_for(model, difference):
            if _is_json(arguments):
                yield TimmSource(trial.source.name, {**trial.source.kwargs, **arguments})


def _arguments_for(model: nn.Module, difference: Difference) -> Iterator[dict[str, Any]]:
    """Arguments of timm's models that can make a difference, the likeliest first."""
    attribute, value = difference.attribute, difference.first
    name = difference.path.rpartition(".")[2]
    if not difference.path and attribute:
        yield {attribute: value}
    elif not difference.path and (kind := type(value).__name__) in _FEATURE_CLASSES:
        arguments = {"features_only": True, "out_indices": getattr(model.feature_info, "out_indices", None)}
        yield arguments
        yield {**arguments, "feature_cls": _FEATURE_CLASSES[kind]}
    elif attribute == "drop_prob" or name.startswith("drop_path") or attribute.startswith("drop_path"):
        rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
        yield {"drop_path_rate": round(max(rates, default=0.0), 6)}
    elif attribute == "p" and name in _DROPOUTS:
        yield {_DROPOUTS[name]: value}
    elif not attribute and isinstance(value, nn.Module):
        yield from ({"act_layer": act} for act in _ACTIVATIONS if timm.layers.get_act_layer(act) is type(value))
    for argument in _SAME_VALUE.get(attribute, ()):
        yield {argument: value}


def _tagged(model: nn.Module, name: str) -> str:
    """The name with the tag of the model's weights, if timm would take another one: of other classes or pixels."""
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    default = timm.get_pretrained_cfg(name)
    tagged = f"{name}.{tag}"
    if "." in name or not tag or default is None or default.tag == tag:
        return name
    return tagged if tagged in timm.list_pretrained(f"{name}.*") else name


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
