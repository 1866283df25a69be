"""Plans made by hand, for tests of what reports show."""

from typing import Any

from ddf_convert.conversion import Action, ConvertConfig, Plan, Replacement, Site
from ddf_convert.conversion.plan import FoundBy, Timed
from ddf_convert.cost.count import Cost


def make_site(
    name: str,
    kind: str = "dense 3x3",
    reason: str = "",
    replaced: bool = False,
    calls: int = 1,
    ms: tuple[float | None, float | None] = (None, None),
    **more: Any,
) -> Site:
    before = Cost(params=36_864, macs=115_605_504, activation_bytes=800, latency_ms=ms[0])
    after = Cost(params=9_000, macs=3_600_000, latency_ms=ms[1])
    return Site(
        name=name,
        kind=kind,
        in_channels=64,
        out_channels=64,
        stride=(1, 1),
        input_shape=(1, 64, 56, 56),
        output_shape=(1, 64, 56, 56),
        calls=calls,
        action=Action.REPLACE if replaced else Action.SKIP,
        reason=reason,
        replacement=Replacement(layer="DDF2d", options={"in_channels": 64}) if replaced else None,
        before=before,
        after=after if replaced else before,
        **more,
    )


def make_plan(*sites: Site, model: str = "net", ms: float | None = None, **more: Any) -> Plan:
    before = Cost(params=25_557_032, macs=4_089_184_256, activation_bytes=85_000_000, latency_ms=ms)
    config = ConvertConfig()
    return Plan(model=model, input_size=(3, 224, 224), config=config, before=before, sites=list(sites), **more)


ODD = make_plan(
    make_site("layer1.0.conv2", reason="bottleneck: 1x1 convolutions on both sides mix channels", replaced=True),
    make_site("a_rather_deep.path_of_modules.that_goes.on_and_on.until_it_passes.eighty_columns.conv", replaced=True),
    make_site("shared", reason="DDF + 1x1: nothing else mixes channels", replaced=True, calls=3),
    make_site("stem", reason="stem: 3 input channels (stem=True replaces it)"),
    make_site("depthwise", "depthwise 3x3", "DDF would add 5 parameters to it (depthwise=True replaces it)"),
    make_site("conv2d", "functional", "called as a function, has no module to swap"),
    make_site("one", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3"),
    make_site("two", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3"),
    make_site("wide", "grouped 1x7", "1x7 kernel; DDF replaces 3x3"),
    make_site("done", "DDF", "already converted: DDF"),
    model="odd",
)


TIMED = make_plan(
    make_site("layer1.0.conv1", reason="DDF + 1x1: nothing else mixes channels", replaced=True, ms=(5.25, 1.125)),
    make_site("layer1.0.conv2", reason="DDF + 1x1: nothing else mixes channels", replaced=True, ms=(2.0, 3.0)),
    make_site("layer2.0.conv1", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3", ms=(0.5, 0.5)),
    make_site("layer2.0.conv2", reason="is odd", ms=(1.0, 1.0), found_by=FoundBy.HOOKS),
    make_site(
        "layer2.0.conv3", replaced=True, ms=(4.0, 4.0), found_by=FoundBy.PIECES, caution="may be looked at elsewhere"
    ),
    ms=20.0,
    timed=Timed(machine="an abacus", replaced=("somebody", "else"), after_ms=1.0),
    notes=["The model as a whole is odd"],
)
