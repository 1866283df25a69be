"""Verification: a copy of the model, converted as planned, runs once; what breaks it is left alone, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from ddf_convert.conversion.plan import Action, Site
from ddf_convert.conversion.recorder import Recording
from ddf_convert.conversion.rewriter import prepare, steps_of, swap
from ddf_convert.errors import first_line
from ddf_convert.utils.fake_copy import Copy, empty_copy, fake_copy, real_copy

_ONE_BY_ONE = 8  # so many sites are found each by itself; then those at the same place of blocks alike go together
_SUSPECTS = 4  # so many sites near the failure are tried before all are bisected


def verify(model: nn.Module, recording: Recording, sites: Sequence[Site]) -> None:
    """Runs a copy of a model as planned, and leaves alone each site whose replacement breaks its forward pass.

    The copy runs as the recorded one did: on shapes alone where that was enough. There, it must also return tensors of
    the recorded shapes, and call every new layer. A run on values can return others, as detectors do.

    Args:
        model: The model; it stays as it is.
        recording: Of the model as it is.
        sites: Every site; some of those to be replaced are skipped, for good.
    """
    rehearsal = _Rehearsal(model, recording, sites)
    chosen = [site.name for site in sites if site.action is Action.REPLACE]
    failure = rehearsal.failure(chosen) if chosen else None
    if failure is None or rehearsal.failure([]) is not None:  # a forward pass that fails now and then tells nothing
        return
    broken = 0
    while failure is not None:
        name, after = _culprit(rehearsal, chosen, failure)
        broken += 1
        culprits = [name] if broken <= _ONE_BY_ONE else [other for other in chosen if rehearsal.alike(name, other)]
        for culprit in culprits:
            _leave_alone(culprit, sites, failure.words)
        chosen = [other for other in chosen if other not in culprits]
        failure = after if after is not _UNKNOWN and len(culprits) == 1 else rehearsal.failure(chosen)


@dataclass(frozen=True)
class _Failure:
    """Why a rehearsal failed.

    Attributes:
        words: For a user.
        place: Where: equal for the same failure in another rehearsal.
        certain: The site that is to blame, if that is known.
        suspects: Sites near the failure, the nearest first.
    """

    words: str
    place: tuple[Any, ...] = ()
    certain: str = ""
    suspects: tuple[str, ...] = ()


_UNKNOWN = _Failure("")  # what is left to be found out by a run


class _Rehearsal:
    """Runs copies of a model in which some of the sites are replaced."""

    def __init__(self, model: nn.Module, recording: Recording, sites: Sequence[Site]) -> None:
        self._model = model
        self._recording = recording
        self._sites = sites

    def alike(self, name: str, other: str) -> bool:
        """Whether two sites stand at the same place of modules of one class."""
        return self._role(name) == self._role(other)

    def _role(self, name: str) -> tuple[type[nn.Module], str]:
        owner, _, attribute = name.rpartition(".")
        return type(self._model.get_submodule(owner)), attribute

    def failure(self, chosen: Sequence[str]) -> _Failure | None:
        """What goes wrong once the chosen sites are replaced; None if nothing does."""
        kept = {"action": Action.SKIP}
        sites = [site if site.name in chosen else site.model_copy(update=kept) for site in self._sites]
        recorded = self._recording.copied
        args, kwargs = recorded.args, recorded.kwargs
        if self._recording.on_values:
            sketch = real_copy(self._model, args, kwargs, recorded.way)
            return self._run(sketch, sites)
        # Without contents and fake tensors a run is quick; of what fails so, fake tensors decide.
        if self._run(empty_copy(self._model, args, kwargs), sites) is None:
            return None
        return self._run(empty_copy(self._model, args, kwargs), sites, fake=True)

    def _run(self, sketch: Copy, sites: Sequence[Site], fake: bool = False) -> _Failure | None:
        """What goes wrong in a copy that is converted and run; its layers are made before its tensors are fake."""
        places: dict[str, str] = {}
        called: set[str] = set()
        converted = sketch.module
        try:
            steps = steps_of(sites, converted)
            replaced = (site.name for site in sites if site.action is Action.REPLACE)
            places = {name: step.places[0] for name, step in zip(replaced, steps, strict=True)}
            converted = swap(converted, prepare(converted, steps))
            sketch = replace(sketch, module=converted)
            if fake:
                recorded = self._recording.copied
                sketch = fake_copy(converted, recorded.args, recorded.kwargs)
                converted = sketch.module
            for name, place in places.items():
                converted.get_submodule(place).register_forward_hook(lambda *_, name=name: called.add(name))
            with sketch.running():
                output = sketch.run()
        except Exception as error:  # forward is the user's code: anything can come out of it
            return _explained(error, converted, places)
        if self._recording.on_values:
            return None
        if uncalled := next((name for name in places if name not in called), None):
            return _Failure("it is not called any more", certain=uncalled)
        return _difference(self._recording.entries[""][-1].output, output)


def _culprit(rehearsal: _Rehearsal, chosen: Sequence[str], failure: _Failure) -> tuple[str, _Failure | None]:
    """The site that is to blame for a failure, and what goes wrong without it, or that this is unknown."""
    if failure.certain:
        return failure.certain, _UNKNOWN
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


def _leave_alone(name: str, sites: Sequence[Site], words: str) -> None:
    for site in sites:
        if site.name == name:
            site.replacement = site.replacement_cost = None  # or an editor could replace it after all
            site.skip(f"its replacement breaks the forward pass: {words}")
            for other in sites:
                if site.convolution and other.name == site.convolution:
                    other.skip(f"part of {name}, whose replacement breaks the forward pass")


def _explained(error: Exception, converted: nn.Module, places: dict[str, str]) -> _Failure:
    """An error, and which sites, whose layers stand in these places, can be to blame for it."""
    modules = dict(converted.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    owners = {id(part): name for name, place in places.items() if place in modules for part in modules[place].modules()}
    frames = [(module, line) for module, line in _modules_of(error) if id(module) in paths]
    inside = [owners[id(module)] for module, _ in frames if id(module) in owners]
    place = "".join(
        f" (in {paths[id(module)] or 'its own forward'}, {type(module).__name__})"
        for module, _ in [each for each in frames if id(each[0]) not in owners][:1]
    )
    asked = owners.get(id(getattr(error, "obj", None)), "") if isinstance(error, AttributeError) else ""
    # A failure inside a layer can be that of what comes before it; one of its caller is near those that it calls.
    near = [
        name
        for module, _ in frames
        for name in places
        if id(module) not in owners and name.rpartition(".")[0] == paths[id(module)]
    ]
    return _Failure(
        f"{first_line(error)}{place}",
        place=(type(error), str(error), *((paths[id(module)], line) for module, line in frames)),
        certain=asked if asked not in inside else "",
        suspects=tuple(dict.fromkeys((*inside, *near))),
    )


def _modules_of(error: BaseException) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose methods an error came through, with line numbers, the innermost first."""
    found = []
    traceback = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            found.append((module, traceback.tb_lineno))
        traceback = traceback.tb_next
    return reversed(found)


def _difference(expected: Any, output: Any) -> _Failure | None:
    """How two outputs differ in structure or shapes, if they do."""
    (before, structure), (after, other) = _pytree.tree_flatten(expected), _pytree.tree_flatten(output)
    pairs = list(zip(map(_shape, before), map(_shape, after), strict=False))
    differing = next(((old, new) for old, new in pairs if old != new), None)
    if differing is not None:
        return _Failure(f"the model returns {differing[1]}, and not {differing[0]}", place=differing)
    return None if structure == other else _Failure("the model returns another structure", place=("structure",))


def _shape(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return "x".join(map(str, leaf.shape)) or "one number"
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return f"{type(leaf).__name__} of {', '.join(_shape(value) for value in vars(leaf).values())}"
    return type(leaf).__name__
