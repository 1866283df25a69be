"""Budgets: which convolutions are replaced where not all should be."""

import pytest
import timm
import torch
from support import networks as net
from support.converted_networks import UNet
from torch import nn

from ddf_convert.conversion import Action, ConvertConfig, plan
from ddf_convert.conversion.budget import apply_budgets
from ddf_convert.cost.count import Cost

IMAGE = torch.empty(1, 3, 64, 64)
FIELDS = {"target_macs": "macs", "target_params": "params"}


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


MODELS = {
    "resnet50": lambda: on_meta("resnet50"),
    "vgg16": lambda: on_meta("vgg16"),
    "regnety_002": lambda: on_meta("regnety_002"),
    "regnetx_002": lambda: on_meta("regnetx_002"),
    "unet": UNet,
}


@pytest.fixture(scope="module", params=MODELS)
def everything(request):
    return plan(MODELS[request.param](), IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.6, 0.95])
@pytest.mark.parametrize("targets", [("target_macs",), ("target_params",), ("target_macs", "target_params")])
def test_targets_are_met_by_no_more_than_is_needed(everything, targets, share):
    options = {}
    for target in targets:
        before, after = (getattr(cost, FIELDS[target]) for cost in (everything.before, everything.after))
        options[target] = round(before - share * (before - after))
    decided = everything.model_copy(deep=True)
    assert apply_budgets(decided.sites, ConvertConfig(**options), decided.before) == []
    assert decided.replaced
    for target in targets:
        assert getattr(decided.after, FIELDS[target]) <= options[target]
    for site in decided.replaced:  # without any one of them the target is missed: it is met to within one site
        rest = decided.after - site.after + site.before
        assert any(getattr(rest, FIELDS[target]) > options[target] for target in targets)
    left = [site for site in decided if site.reason == f"not needed for {' and '.join(targets)}"]
    assert len(left) + len(decided.replaced) == len(everything.replaced)


@pytest.mark.slow
def test_a_target_out_of_reach_is_said_and_comes_as_near_as_can_be():
    decided = plan(on_meta("resnet18"), IMAGE, target_params="1M", target_macs="10G")
    everything = plan(on_meta("resnet18"), IMAGE)
    assert decided.after.params == everything.after.params
    (note,) = decided.notes
    assert note == (
        f"target_params 1,000,000 is out of reach: {everything.after.params:,} parameters are left when everything is"
        " replaced that can be and helps"
    )


def test_a_target_that_is_met_already_replaces_nothing():
    decided = plan(on_meta("resnet18"), IMAGE, target_macs="2G")
    assert decided.replaced == []
    assert decided.notes == []


def alike():
    """Three convolutions that save the same, then one that saves more, then one that saves less."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 1), net.conv(), net.conv(), net.conv(), net.conv(32, 96), nn.MaxPool2d(4), net.conv(96, 96)
    )


@pytest.mark.slow
def test_the_fewest_are_replaced_and_of_equals_the_nearest_to_the_output():
    everything = plan(alike(), IMAGE)
    saving = {site.name: site.before.macs - site.after.macs for site in everything.replaced}
    assert saving["1"] == saving["2"] == saving["3"] < saving["4"]
    before = everything.before.macs

    def chosen(saved):
        return [site.name for site in plan(alike(), IMAGE, target_macs=before - saved).replaced]

    assert chosen(saving["4"]) == ["4"]
    assert chosen(saving["4"] + 1) == ["4", min(saving, key=saving.get)]
    assert chosen(saving["1"]) == ["3"]
    assert chosen(saving["4"] + saving["1"]) == ["3", "4"]


def replaced_of(savings, targets):
    """Which sites are replaced, of those that save so many (MACs, parameters), to save what the targets say."""
    decided = plan(alike(), IMAGE)
    sites = decided.replaced[: len(savings)]
    for site, (macs, params) in zip(sites, savings, strict=True):
        site.before, site.replacement_cost = Cost(macs=100, params=100), Cost(macs=100 - macs, params=100 - params)
    options = dict(zip(FIELDS, (1000 - target for target in targets), strict=True))
    notes = apply_budgets(sites, ConvertConfig(**options), Cost(macs=1000, params=1000))
    return [place for place, site in enumerate(sites) if site.action is Action.REPLACE], notes


def test_what_the_later_ones_make_needless_is_not_replaced():
    # The first is worth most of both targets together; the others are needed all the same, and are enough.
    assert replaced_of([(8, 4), (10, 0), (0, 10)], (10, 10)) == ([1, 2], [])


def test_what_is_against_a_target_out_of_reach_is_not_replaced():
    replaced, (note,) = replaced_of([(5, 0), (-5, 3), (0, 8)], (10, 0))
    assert replaced == [0]
    assert note.startswith("target_macs 990 is out of reach: 995 MACs are left")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "kept"), [({"keep_first": 2}, {0, 1}), ({"keep_last": 1}, {4}), ({}, set())])
def test_the_ends_are_kept(options, kept):
    decided = plan(alike(), IMAGE, **options)
    candidates = [site for site in decided if site.replacement is not None]
    assert {place for place, site in enumerate(candidates) if site.action is Action.SKIP} == kept
    assert all("kept: among the" in candidates[place].reason for place in kept)


def test_keeping_more_than_there_are_keeps_all():
    assert plan(alike(), IMAGE, keep_first=3, keep_last=3).replaced == []
    assert plan(alike(), IMAGE, keep_last=99).replaced == []


def test_only_what_gets_faster_is_replaced():
    decided = plan(alike(), IMAGE)
    for site, (before, after) in zip(decided.replaced, [(2, 1), (1, 1), (1, 2), (3, 1), (1, 3)], strict=True):
        site.before = site.before.model_copy(update={"latency_ms": before})
        site.after = site.after.model_copy(update={"latency_ms": after})
    apply_budgets(decided.sites, ConvertConfig(only_faster=True), decided.before)
    assert [site.name for site in decided.replaced] == ["1", "4"]
    assert decided["3"].reason == "would not be faster here: 1 ms would become 2 ms (only_faster)"


@pytest.mark.slow
def test_only_faster_measures_on_this_machine():
    model = alike()
    decided = plan(model, IMAGE[..., :16, :16], only_faster=True)
    assert decided.machine
    assert decided.before.latency_ms > 0
    for site in decided:
        assert site.before.latency_ms > 0
        if site.replacement is not None:
            faster = site.replacement_cost.latency_ms < site.before.latency_ms
            assert (site.action is Action.REPLACE) == faster
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("quick_timing")
def test_a_model_on_meta_can_be_measured():
    decided = plan(on_meta("resnet10t"), torch.empty(1, 3, 32, 32, device="meta"), measure=True)
    assert decided.before.latency_ms > 0
    assert all(site.replacement_cost.latency_ms > 0 for site in decided.replaced)
    assert plan(on_meta("resnet10t"), IMAGE).before.latency_ms is None
