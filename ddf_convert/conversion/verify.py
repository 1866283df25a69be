"""Verification: a copy of the model, converted as planned, runs once; sites whose replacement breaks it are skipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from ddf_convert.conversion.plan import Action, Site
from ddf_convert.conversion.recorder import Recording
from ddf_convert.conversion.rewriter import apply_replacements, replacements_of
from ddf_convert.conversion.tracer import Traced
from ddf_convert.errors import first_line
from ddf_convert.utils.fake_copy import ModelCopy, empty_copy, fake_copy, real_copy

_ONE_BY_ONE = 8  # the first culprits are found one by one; then those at the same place of equal blocks go together
_SUSPECTS = 4  # sites near the failure that are tried before all are bisected


def verify(model: nn.Module, recording: Recording, traced: Traced, sites: Sequence[Site]) -> None:
    """Runs a copy of a model as planned, and skips each site whose replacement breaks its forward pass.

    The copy runs as the recorded one did: on shapes alone where that was enough. There, it must also return tensors of
    the recorded shapes, and call every new layer. A run on values can return other shapes, as detectors do.
    """
    rehearsal = _Rehearsal(model, recording, traced, sites)
    chosen = [site.name for site in sites if site.action is Action.REPLACE]
    failure = rehearsal.failure(chosen) if chosen else None
    if failure is None or rehearsal.failure([]) is not None:  # a forward pass that fails now and then shows nothing
        return
    broken = 0
    while failure is not None:
        name, after = _find_culprit(rehearsal, chosen, failure)
        broken += 1
        culprits = [name] if broken <= _ONE_BY_ONE else [other for other in chosen if rehearsal.same_role(name, other)]
        for culprit in culprits:
            _skip(culprit, sites, failure.message)
        chosen = [other for other in chosen if other not in culprits]
        failure = after if after is not _UNKNOWN and len(culprits) == 1 else rehearsal.failure(chosen)


@dataclass(frozen=True)
class _Failure:
    """Why a rehearsal failed."""

    message: str  # for a user
    place: tuple[Any, ...] = ()  # equal for the same failure in another rehearsal
    culprit: str = ""  # the site that is to blame, if that is known
    suspects: tuple[str, ...] = ()  # sites near the failure, the nearest first


_UNKNOWN = _Failure("")  # another run has to find out


class _Rehearsal:
    """Runs copies of a model in which some of the sites are replaced."""

    def __init__(self, model: nn.Module, recording: Recording, traced: Traced, sites: Sequence[Site]) -> None:
        self._model = model
        self._recording = recording
        self._traced = None if recording.on_values else traced  # which has constants of the copy's device
        self._sites = sites

    def same_role(self, name: str, other: str) -> bool:
        """Whether two sites stand at the same place of modules of one class."""
        return self._role(name) == self._role(other)

    def _role(self, name: str) -> tuple[type[nn.Module], str]:
        owner, _, attribute = name.rpartition(".")
        return type(self._model.get_submodule(owner)), attribute

    def failure(self, chosen: Sequence[str]) -> _Failure | None:
        """Returns what goes wrong once the chosen sites are replaced; None if nothing does."""
        skipped = {"action": Action.SKIP}
        sites = [site if site.name in chosen else site.model_copy(update=skipped) for site in self._sites]
        recorded = self._recording.copied
        args, kwargs = recorded.args, recorded.kwargs
        if self._recording.on_values:
            return self._run(real_copy(self._model, args, kwargs, recorded.run_mode), sites)
        # Without contents and fake tensors a run is quick; where it fails, fake tensors decide.
        if self._run(empty_copy(self._model, args, kwargs), sites) is None:
            return None
        return self._run(empty_copy(self._model, args, kwargs), sites, fake=True)

    def _run(self, copied: ModelCopy, sites: Sequence[Site], fake: bool = False) -> _Failure | None:
        """Converts and runs a copy; with ``fake``, its tensors become fake once its layers are built."""
        places: dict[str, str] = {}
        called: set[str] = set()
        converted = copied.module
        try:
            replacements = replacements_of(sites, converted)
            replaced = (site.name for site in sites if site.action is Action.REPLACE)
            places = {name: applied.places[0] for name, applied in zip(replaced, replacements, strict=True)}
            converted = apply_replacements(converted, replacements, self._traced)
            copied = dataclasses.replace(copied, module=converted)
            if fake:
                copied = fake_copy(converted, self._recording.copied.args, self._recording.copied.kwargs)
                converted = copied.module
            for name, place in places.items():
                converted.get_submodule(place).register_forward_hook(lambda *_, name=name: called.add(name))
            with copied.running():
                output = copied.run()
        except Exception as error:  # forward is the user's code: anything can come out of it
            return _explain(error, converted, places)
        if self._recording.on_values:
            return None
        if uncalled := next((name for name in places if name not in called), None):
            return _Failure("it is not called any more", culprit=uncalled)
        return _difference(self._recording.entries[""][-1].output, output)


def _find_culprit(rehearsal: _Rehearsal, chosen: Sequence[str], failure: _Failure) -> tuple[str, _Failure | None]:
    """Returns the site that is to blame, and the failure without it, or _UNKNOWN."""
    if failure.culprit:
        return failure.culprit, _UNKNOWN
    for name in failure.suspects[:_SUSPECTS]:
        after = rehearsal.failure([other for other in chosen if other != name])
        if after is None or after.place != failure.place:
            return name, after
    passes, fails = 0, len(chosen)
    while fails - passes > 1:
        middle = (passes + fails) // 2
        if rehearsal.failure(chosen[:middle]) is None:
            passes = middle
        else:
            fails = middle
    return chosen[fails - 1], _UNKNOWN


def _skip(name: str, sites: Sequence[Site], message: str) -> None:
    by_name = {site.name: site for site in sites}
    site = by_name[name]
    site.replacement = site.replacement_cost = None  # or an editor could replace it after all
    site.skip(f"its replacement breaks the forward pass: {message}")
    if site.convolution in by_name:
        by_name[site.convolution].skip(f"part of {name}, whose replacement breaks the forward pass")


def _explain(error: Exception, converted: nn.Module, places: dict[str, str]) -> _Failure:
    """Describes an error, and which sites, whose layers stand in these places, can be to blame for it."""
    modules = dict(converted.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    owners = {id(part): name for name, place in places.items() if place in modules for part in modules[place].modules()}
    frames = [(module, line) for module, line in _module_frames(error) if id(module) in paths]
    inside = [owners[id(module)] for module, _ in frames if id(module) in owners]
    outside = [module for module, _ in frames if id(module) not in owners]
    where = f" (in {paths[id(outside[0])] or 'its own forward'}, {type(outside[0]).__name__})" if outside else ""
    missing_in = owners.get(id(getattr(error, "obj", None)), "") if isinstance(error, AttributeError) else ""
    # A failure inside a layer can be caused by what comes before it; one of its caller is near those that it calls.
    near = [name for module in outside for name in places if name.rpartition(".")[0] == paths[id(module)]]
    return _Failure(
        f"{first_line(error)}{where}",
        place=(type(error), str(error), *((paths[id(module)], line) for module, line in frames)),
        culprit=missing_in if missing_in not in inside else "",
        suspects=tuple(dict.fromkeys((*inside, *near))),
    )


def _module_frames(error: BaseException) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose methods an error came through, with line numbers, the innermost first."""
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            frames.append((module, traceback.tb_lineno))
        traceback = traceback.tb_next
    return reversed(frames)


def _difference(expected: Any, output: Any) -> _Failure | None:
    """How two outputs differ in structure or shapes, if they do."""
    (before, structure), (after, other) = _pytree.tree_flatten(expected), _pytree.tree_flatten(output)
    for old, new in zip(map(_shape, before), map(_shape, after), strict=False):
        if old != new:
            return _Failure(f"the model returns {new}, and not {old}", place=(old, new))
    return None if structure == other else _Failure("the model returns another structure", place=("structure",))


def _shape(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return "x".join(map(str, leaf.shape)) or "one number"
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return f"{type(leaf).__name__} of {', '.join(_shape(value) for value in vars(leaf).values())}"
    return type(leaf).__name__
