"""The source of a model before conversion: timm, if timm provably builds the same network, or else its user."""

from __future__ import annotations

import difflib
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import timm
import timm.layers
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator
from torch import fx, nn

from ddf_convert.artifacts.module_diff import ModuleDiff, ModuleDifference, diff_modules
from ddf_convert.artifacts.state import describe_difference, state_shapes
from ddf_convert.conversion.interpolate_hook import class_of
from ddf_convert.conversion.record import Conversion
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.errors import DDFError, UsageError, first_line, in_one_line
from ddf_convert.utils.fake_copy import real_copy
from ddf_convert.utils.modules import model_name

# Arguments of timm.create_model that make it read or download files; an artifact never contains them.
FILE_ARGUMENTS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}
_MAX_TRIALS = 12  # in a search for arguments; each takes a fraction of a second
_FEATURE_CLASSES = {
    "FeatureListNet": "list",
    "FeatureDictNet": "dict",
    "FeatureHookNet": "hook",
    "FeatureGetterNet": "getter",
    "FeatureGraphNet": "fx",
}
# Module names, and the argument that sets their dropout.
_DROPOUT_ARGUMENTS = {
    "attn_drop": "attn_drop_rate",
    "head_drop": "drop_rate",
    "pos_drop": "pos_drop_rate",
    "proj_drop": "proj_drop_rate",
}
# Attributes inside a model, and the arguments that set them.
_VALUE_ARGUMENTS = {
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
        name: timm's model name, with or without the tag of its weights.
        kwargs: Further arguments of ``timm.create_model``, of types that JSON has.

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
            if not isinstance(name, str) or not is_json(value):
                raise ValueError(f"{name} is {type(value).__name__}, which JSON does not have")
        return {name: json.loads(json.dumps(value)) for name, value in kwargs.items()}  # tuples become lists


class OwnSource(BaseModel):
    """A model that only its user can build; ``restore`` loads its weights.

    Attributes:
        model_class: Module and name of its class, for messages; never imported.
        reason: Why the source is not timm, if timm has a model of its name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["own"] = "own"
    model_class: str = Field(alias="class")
    reason: str = ""


def find_source(
    model: nn.Module, conversion: Conversion, requested: TimmSource | str | None = None
) -> TimmSource | OwnSource:
    """Finds the source of a converted model.

    timm is the source only if what it builds, converted, is the same network: the same names and shapes of weights, and
    no difference that ``module_diff`` finds. If something cannot be compared, both also have to give the same outputs.
    The arguments are those that timm noted in the model, or are searched for.

    Args:
        model: The converted model, without wrappers.
        conversion: Its record.
        requested: The user's source: a timm name, whose arguments are searched for, or name and arguments.

    Raises:
        UsageError: The requested source builds another network.
    """
    # A GraphModule is a class of its own each time: the name of the model that it was made of identifies it better.
    graph = isinstance(model, fx.GraphModule)
    described = conversion.source if graph else model_name(model)
    given = requested if isinstance(requested, TimmSource) else None
    name = given.name if given else str(requested or described)
    known = timm.is_model(name)
    reason = f"timm has no model {name!r}"
    if known:
        trial = _try(model, conversion, given) if given else _search(model, conversion, _with_tag(model, name))
        if not trial.reason:
            return trial.source
        reason = trial.reason
    if requested is not None:
        raise UsageError(f"the model cannot be saved as timm's {name}: {reason}")
    kind = class_of(model)
    fields = {"class": described if graph else f"{kind.__module__}.{kind.__qualname__}"}
    return OwnSource.model_validate({**fields, "reason": reason if known else ""})


def build_source(source: TimmSource, device: str) -> nn.Module:
    """Builds a fresh model; nothing is downloaded or read, and torch's random state stays unchanged."""
    if not timm.is_model(source.name):
        raise UsageError(f"timm {timm.__version__} has no model {source.name!r}")
    reading = [name for name in source.kwargs if name in FILE_ARGUMENTS]
    if reading:
        raise UsageError(f"{reading[0]} is not an argument that an artifact may give to timm")
    with torch.random.fork_rng(devices=[]):
        return build_timm_model(source.name, source.kwargs, device)


def build_timm_model(name: str, kwargs: Mapping[str, Any], device: str) -> nn.Module:
    """Calls ``timm.create_model`` without pretrained weights; raises UsageError if that fails.

    The device "meta" falls back to the CPU: some models look at values while they are built.
    """
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=False, **kwargs)
    except DDFError:  # it becomes too large, on any device
        raise
    except Exception as error:
        if device == "meta":
            return build_timm_model(name, kwargs, "cpu")
        reason = f"it knows no {error}" if isinstance(error, KeyError) else first_line(error)
        hint = _argument_hint(name, error) if kwargs else ""
        raise UsageError(f"timm {timm.__version__} cannot build {name}: {reason}{hint}") from error


def is_json(value: Any) -> bool:
    """Returns whether JSON can hold a value; NaN and infinity are not JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _argument_hint(name: str, error: Exception) -> str:
    """Returns the arguments of a timm model that are spelled nearly like one that it refused."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return ""
    try:
        with torch.device("meta"):
            known = inspect.signature(type(timm.create_model(name, pretrained=False))).parameters
    except Exception:  # the hint is not worth an error
        return ""
    near = difflib.get_close_matches(unknown[1], [*known, "features_only", "out_indices"], n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# --- the proof that timm builds the same network ---


@dataclass(frozen=True)
class _Trial:
    """The comparison of a model with what timm builds from a source."""

    source: TimmSource
    reason: str  # why the two are not the same network; "" if they are
    differences: tuple[ModuleDifference, ...] = ()
    distance: float = float("inf")  # number of differences, including names and shapes of the weights


def _try(model: nn.Module, conversion: Conversion, source: TimmSource) -> _Trial:
    try:
        built = _build_converted(source, conversion, "meta")
    except UsageError as error:
        return _Trial(source, str(error))
    mine, theirs = state_shapes(model, extra_states=False), state_shapes(built, extra_states=False)
    unequal = sum(mine.get(name) != theirs.get(name) for name in {*mine, *theirs})
    diff = diff_modules(model, built)
    if not unequal and not diff.differences and (diff.without_values or diff.undecided):
        built = _build_converted(source, conversion, "cpu")
        diff = diff_modules(model, built)
    reason = describe_difference(theirs, mine) or _first_difference(diff) or _output_difference(model, built, diff)
    return _Trial(source, reason, tuple(diff.differences), unequal + len(diff.differences))


def _build_converted(source: TimmSource, conversion: Conversion, device: str) -> nn.Module:
    built = build_source(source, device)
    return apply_replacements(built, conversion.replaced)


def _first_difference(diff: ModuleDiff) -> str:
    if not diff.differences:
        return ""
    first = diff.differences[0]
    mine, theirs = first.describe_values()
    return f"it has {first.name or 'the class'} {mine} where timm builds {theirs}"


def _output_difference(model: nn.Module, built: nn.Module, diff: ModuleDiff) -> str:
    """Returns why the outputs for equal weights may differ; models run only if something else cannot be compared."""
    open_questions = [*diff.undecided, *diff.without_values]
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


# --- the search for the arguments that timm was given ---


def _search(model: nn.Module, conversion: Conversion, name: str) -> _Trial:
    """Returns the nearest trial: with the arguments that timm noted, then with one more at a time."""
    tried: list[TimmSource] = []
    best = None
    sources = iter(_first_guesses(model, name))
    while len(tried) < _MAX_TRIALS:
        source = next((each for each in sources if each not in tried), None)
        if source is None:
            break
        tried.append(source)
        trial = _try(model, conversion, source)
        if best is None or not trial.reason or trial.distance < best.distance:
            best = trial
            sources = itertools.chain(sources if len(tried) == 1 else (), _refine(model, best))
        if not best.reason:
            break
    assert best is not None
    return best


def _first_guesses(model: nn.Module, name: str) -> Iterator[TimmSource]:
    """Yields sources with the arguments that timm noted, and with none; both with the model's present sizes."""
    noted: dict[str, Any] = getattr(model, "_model_args", {})
    noted = {key: value for key, value in noted.items() if is_json(value) and key not in FILE_ARGUMENTS}
    configuration = getattr(model, "pretrained_cfg", None) or {}
    first, modules = configuration.get("first_conv"), dict(model.named_modules())
    channels = getattr(modules.get(first), "in_channels", 3) if isinstance(first, str) else 3
    for arguments in (noted, {}):
        sizes = {}
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and classes != arguments.get("num_classes", configuration.get("num_classes")):
            sizes["num_classes"] = classes
        # The image may have this many channels, or the model folds pixels into channels before its first convolution.
        if channels != arguments.get("in_chans", 3):
            yield TimmSource(name, {**arguments, **sizes, "in_chans": channels})
        yield TimmSource(name, {**arguments, **sizes})


def _refine(model: nn.Module, trial: _Trial) -> Iterator[TimmSource]:
    """Yields the source of a trial with one argument more: each that can explain a difference."""
    for difference in trial.differences:
        for arguments in _arguments_for(model, difference):
            if is_json(arguments):
                yield TimmSource(trial.source.name, {**trial.source.kwargs, **arguments})


def _arguments_for(model: nn.Module, difference: ModuleDifference) -> Iterator[dict[str, Any]]:
    """Yields arguments of timm's models that can make a difference, the likeliest first."""
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
    elif attribute == "p" and name in _DROPOUT_ARGUMENTS:
        yield {_DROPOUT_ARGUMENTS[name]: value}
    elif not attribute and isinstance(value, nn.Module):
        yield from ({"act_layer": act} for act in _ACTIVATIONS if timm.layers.get_act_layer(act) is type(value))
    for argument in _VALUE_ARGUMENTS.get(attribute, ()):
        yield {argument: value}


def _with_tag(model: nn.Module, name: str) -> str:
    """Returns the name with the tag of the model's weights, if timm's default tag has other classes or pixels."""
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    default = timm.get_pretrained_cfg(name)
    tagged = f"{name}.{tag}"
    if "." in name or not tag or default is None or default.tag == tag:
        return name
    return tagged if tagged in timm.list_pretrained(f"{name}.*") else name
