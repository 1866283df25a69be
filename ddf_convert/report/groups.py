"""Which of a comparison's layers a reader wants to see one by one, which are only counted, and what to say of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddf_convert.conversion.plan import is_upsampling
from ddf_convert.conversion.registry import is_new
from ddf_convert.report.measures import MEASURES, Measure

if TYPE_CHECKING:
    from ddf_convert.report.comparison import Comparison, Layer


def changed(comparison: Comparison) -> list[Layer]:
    """What both models have, in different forms."""
    return [layer for layer in comparison.layers if layer.before and layer.after and layer.changed]


def only_before(comparison: Comparison) -> list[Layer]:
    """What the model after no longer has."""
    return [layer for layer in comparison.layers if layer.after is None]


def only_after(comparison: Comparison) -> list[Layer]:
    """What the model before did not have."""
    return [layer for layer in comparison.layers if layer.before is None]


def left_alone(comparison: Comparison) -> list[Layer]:
    """What one might have expected to see replaced: of the sizes that DDF replaces, the functional ones, upsampling."""
    return [layer for layer in comparison.layers if not layer.changed and not _expected(layer, comparison)]


def others(comparison: Comparison) -> list[Layer]:
    """The other unchanged ones: of other kernel sizes, and what was converted before."""
    return [layer for layer in comparison.layers if not layer.changed and _expected(layer, comparison)]


def counted(layers: Sequence[Layer]) -> str:
    """``"36 of 1x1, 1 of 7x7"``, the most frequent first."""
    sizes = ((_size(layer), layer.kind) for layer in layers)
    return ", ".join(f"{n} {what}" for what, n in Counter(f"of {s}" if s else kind for s, kind in sizes).most_common())


def headline(comparison: Comparison) -> str:
    """``"16 of 53 convolutions replaced"``."""
    if not comparison.layers:
        return "no convolutions"
    words = f"{len(changed(comparison))} of {number(comparison.layers)} {verb(comparison)}"
    sides = (("only before", only_before(comparison)), ("only after", only_after(comparison)))
    return ", ".join([words, *(f"{len(layers)} {where}" for where, layers in sides if layers)])


def verb(comparison: Comparison) -> str:
    """What happened to the changed ones."""
    return "replaced" if all(_is_told_by_kind(layer) for layer in changed(comparison)) else "changed"


def number(layers: Sequence[Layer], other: bool = False) -> str:
    """``"1 convolution"``, ``"2 other convolutions"``; with upsampling among them, ``"3 layers"``."""
    word = noun(layers)
    return f"{len(layers)} {'other ' if other else ''}{word if len(layers) == 1 else f'{word}s'}"


def noun(layers: Sequence[Layer]) -> str:
    """What to call one of these, whichever it is."""
    upsampling = (is_upsampling(layer.kind) or layer.kind.startswith("DDF-Up") for layer in layers)
    return "layer" if any(upsampling) else "convolution"


def becomes(layer: Layer) -> str:
    """What takes a changed layer's place, in a word or two."""
    return (layer.kind_after or "") if _is_told_by_kind(layer) else f"{layer.kind_before} -> {layer.kind_after}"


def grew(layer: Layer, measure: Measure) -> bool:
    """Whether a change made something greater."""
    before, after = measure.of(layer.before), measure.of(layer.after)
    return layer.changed and before is not None and after is not None and after > before


def grown(comparison: Comparison) -> str:
    """What is greater after than before in single layers: gains elsewhere must not hide it. Empty if nothing is."""
    counts = ((measure.name, sum(grew(layer, measure) for layer in comparison.layers)) for measure in MEASURES)
    words = [f"{name} of {count}" for name, count in counts if count]
    if not words:
        return ""
    return f"More than before: {', '.join(words)}, out of {number(changed(comparison))} {verb(comparison)}"


def _is_told_by_kind(layer: Layer) -> bool:
    """Whether what a layer is now says enough: it is of a kind that took another's place."""
    after = layer.kind_after or ""
    return is_new(after) or (after.startswith("depthwise") and after != layer.kind_before)


def _size(layer: Layer) -> str | None:
    size = re.fullmatch(r"\w+ (\d+x\d+)", layer.kind)
    return size[1] if size else None


def _expected(layer: Layer, comparison: Comparison) -> bool:
    sizes = {f"{size}x{size}" for config in comparison.configs for size in config.kernel_size} or {"3x3"}
    if layer.kind.startswith("transposed") and any(config.upsample for config in comparison.configs):
        return False
    size = _size(layer)
    return is_new(layer.kind) or (size is not None and size not in sizes)
