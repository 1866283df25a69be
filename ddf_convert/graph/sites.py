"""Sites: every convolution of a model, its calls, and what is known of its surroundings."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import fx, nn

from ddf_convert.graph.bottleneck import is_bottleneck
from ddf_convert.graph.plan import FoundBy
from ddf_convert.graph.record import CONVOLUTIONS, Call, Recording
from ddf_convert.graph.trace import Traced
from ddf_convert.layers import DDF2d, DDFConv2d


@dataclass(frozen=True)
class Convolution:
    """One convolution of the model, before anything is decided about it.

    Attributes:
        names: Every path at which the module is registered; for a functional call, its one name.
        module: The user's own module; None for a functional call.
        calls: Its calls in the forward pass, in order.
        found_by: How its calls were found.
        caution: What is not known of it, and why; empty where all is.
        bottleneck: 1x1 convolutions stand before and after every call, and nothing else meets the feature between.
        used_directly: The forward pass also reads its weight or bias by itself.
        shared_with: Another convolution (or other module) that holds the same weight or bias, if any.
        used_elsewhere: A functional call's weight or bias is used by something else too.
    """

    names: tuple[str, ...]
    module: nn.Module | None
    calls: tuple[Call, ...]
    found_by: FoundBy = FoundBy.FX
    caution: str = ""
    bottleneck: bool = False
    used_directly: bool = False
    shared_with: str | None = None
    used_elsewhere: bool = False

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def find_convolutions(model: nn.Module, recording: Recording, traced: Traced) -> list[Convolution]:
    """Every 2D convolution of a model: in the order of the forward pass, then those that it does not reach.

    The convolutions that belong to a DDF layer are part of it and not listed.
    """
    calls: dict[str, list[Call]] = {}
    for call in recording.calls:
        calls.setdefault(call.name, []).append(call)
    modules = {names[0]: (module, names) for module, names in module_names(model)}
    holders = _holders(model)
    found = []
    for name in dict.fromkeys([*calls, *modules]):
        module, names = modules.get(name, (None, (name,)))
        own = tuple(calls.get(name, ()))
        parameters = [] if module is None else [value for value in module._parameters.values() if value is not None]
        sharing = [path for parameter in parameters for path in holders[id(parameter)] if path not in names]
        nodes, found_by, caution = _surroundings(name, own, recording, traced)
        found.append(
            Convolution(
                names=names,
                module=module,
                calls=own,
                found_by=found_by,
                caution=caution,
                bottleneck=bool(nodes) and module is not None and all(map(is_bottleneck, nodes)),
                used_directly=not recording.read_directly.isdisjoint(names),
                shared_with=next(iter(sharing), None),
                used_elsewhere=_is_used_elsewhere(own, recording, modules),
            )
        )
    return found


def module_names(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every convolution module below the model, with all its paths, in the order of registration."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    inside_ddf: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or path.startswith(inside_ddf):
            continue
        if isinstance(module, CONVOLUTIONS):
            names.setdefault(id(module), (module, []))[1].append(path)
        if isinstance(module, DDF2d | DDFConv2d):
            inside_ddf = (*inside_ddf, f"{path}.")
    return [(module, tuple(paths)) for module, paths in names.values()]


def _surroundings(
    name: str, calls: tuple[Call, ...], recording: Recording, traced: Traced
) -> tuple[list[fx.Node], FoundBy, str]:
    """The nodes of a convolution's calls, if the graphs hold all of them; how it was found, and what is not known."""
    pieces = [piece for piece in traced.pieces if name in piece.nodes]
    nodes = [node for piece in pieces for node in piece.nodes[name]]
    complete = sum(piece.entries * len(piece.nodes[name]) for piece in pieces) == len(calls)
    place, reason = traced.why_untraced(name)
    inside = f"inside {place or 'the model'} ({_class_of(place, recording)}), which {reason}" if reason else ""
    if complete and all(not piece.path for piece in pieces):
        return nodes, FoundBy.FX, ""
    if complete:
        return nodes, FoundBy.PIECES, f"{inside}: of what surrounds this piece nothing is known"
    return [], FoundBy.HOOKS, f"{inside or 'called where torch.fx does not see it'}: of its neighbours nothing is known"


def _class_of(path: str, recording: Recording) -> str:
    return type(recording.copied.module.get_submodule(path)).__name__


def _is_used_elsewhere(calls: tuple[Call, ...], recording: Recording, modules: Container[str]) -> bool:
    """Whether the parameters of a functional call are not its own alone."""
    function = calls[0].function if calls else None
    parameters = function.parameters if function else ()
    return any(recording.uses[path] != len(calls) or path.rpartition(".")[0] in modules for path in parameters)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter themselves, by the parameter's id."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path or type(model).__name__)
    return holders
