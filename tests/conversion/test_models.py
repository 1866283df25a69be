"""Kinds of models: what goes in and comes out, what torch.fx cannot follow, wrappers; and that nothing is harmed."""

import copy
import functools
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from support import networks as net
from torch import nn
from torch.utils import _pytree

from ddf_convert.conversion import Action, FoundBy, convert, plan, recorded
from ddf_convert.cost.count import measure
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d
from ddf_convert.utils.fake_copy import real_copy

IMAGE = torch.randn(1, 3, 20, 20)
MASK, SHIFT = torch.rand(1, 1, 20, 20), torch.randn(1, 32, 1, 1)
NAMED = {"image": IMAGE, "mask": MASK, "extra": {"shift": SHIFT}}
FX, PIECES, HOOKS = FoundBy.FX, FoundBy.PIECES, FoundBy.HOOKS

# name: (model, example input, site, how it is found, whether 1x1 convolutions mix around it)
MODELS = {
    "several inputs, tuple out": (net.ManyInputs(), NAMED, "conv", FX, False),
    "dict out": (net.ManyInputs("dict"), NAMED, "conv", FX, False),
    "list out": (net.ManyInputs("list"), NAMED, "conv", FX, False),
    "dataclass out": (net.ManyInputs("dataclass"), NAMED, "conv", FX, False),
    "a flag given": (net.ManyInputs(), {**NAMED, "scale": True}, "conv", FX, False),
    "a dict as the one argument": (net.TakesDict(), {"image": IMAGE}, "conv", FX, False),
    "a dict in a tuple": (net.TakesDict(), ({"image": IMAGE},), "conv", FX, False),
    "a list of images": (net.TakesList(), ([IMAGE[0], IMAGE[0, :, :9]],), "body.conv", PIECES, True),
    "an optional argument": (net.Optional(), (IMAGE, MASK), "conv", FX, False),
    "control flow on values, a block": (net.Untraceable(), IMAGE, "blocks.0.conv", PIECES, True),
    "control flow on values, its own": (net.Untraceable(), IMAGE, "conv", HOOKS, False),
    "an untraceable middle, outside": (net.AroundUntraceable(), IMAGE, "last", FX, False),
    "an untraceable middle, a block": (net.AroundUntraceable(), IMAGE, "middle.blocks.1.conv", PIECES, True),
    "a loop over a size": (net.Iterating(), torch.randn(2, 3, 20, 20), "conv", HOOKS, False),
    "a loop over modules": (net.Loop(), IMAGE, "convs.0", FX, False),
    "state and randomness": (net.Stateful(), IMAGE, "conv", HOOKS, False),
    "on the meta device": (net.Untraceable().to("meta"), IMAGE, "blocks.0.conv", PIECES, True),
    "in bfloat16": (net.Untraceable().bfloat16(), IMAGE.bfloat16(), "conv", HOOKS, False),
    "in float16": (net.Loop().half(), IMAGE.half(), "convs.0", FX, False),
    "in DataParallel": (nn.DataParallel(net.Loop()), IMAGE, "convs.0", FX, False),
}


def called(model, example):
    if isinstance(example, dict) and "mask" in example:
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def shapes(outputs):
    outputs = vars(outputs) if isinstance(outputs, net.Outputs) else outputs
    return _pytree.tree_map(lambda leaf: leaf.shape if isinstance(leaf, torch.Tensor) else leaf, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_sites_are_found_and_replaced(case):
    model, example, name, found_by, mixed = MODELS[case]
    decided = plan(model, example)
    site = decided[name]
    assert (site.action, site.found_by) == (Action.REPLACE, found_by)
    assert bool(site.caution) == (found_by is not FX)
    assert site.replacement.layer == ("DDF2d" if mixed else "DDFConv2d")
    converted = convert(model, decided)
    assert type(converted) is type(model)
    inner = converted.module if isinstance(model, nn.DataParallel) else converted
    assert isinstance(inner.get_submodule(name), DDF2d | DDFConv2d)
    before, after = (real_copy(module).module for module in (model, converted))  # the meta one gets weights
    assert shapes(called(before, example)) == shapes(called(after, example))
    arguments = (example,) if isinstance(example, torch.Tensor) else example if isinstance(example, tuple) else ()
    named = example if isinstance(example, dict) and "mask" in example else {}
    if arguments or named:
        cost = measure(converted, *arguments, **named)
        assert (cost.params, cost.macs) == (decided.after.params, decided.after.macs)


def test_cautions_and_notes_name_the_place_and_the_reason():
    decided = plan(net.AroundUntraceable(), IMAGE)
    assert decided["middle.conv"].calls == 2
    assert decided["middle.conv"].caution == (
        "inside middle (Untraceable), which torch.fx cannot trace (symbolically traced variables cannot be used as"
        " inputs to control flow): of its neighbors nothing is known"
    )
    assert decided.notes == ["The forward pass depends on values: what it calls, and the shapes, are those of one run"]
    (whole,) = plan(net.Iterating(), IMAGE).notes
    assert whole.startswith("The model as a whole torch.fx cannot trace (")
    assert whole.endswith("Convolutions found: 2 by running the model")
    assert plan(net.Loop(), IMAGE).notes == []


def states():
    numbers = numpy.random.get_state()
    return random.getstate(), numbers[0], numbers[1].tolist(), *numbers[2:], torch.get_rng_state().tolist()


def test_planning_a_model_that_has_to_run_harms_nothing():
    model = net.Stateful().train()
    model.first.requires_grad_(False)
    seen = []
    model.first.register_forward_hook(lambda module, args, output: seen.append(output))
    model.first.register_forward_pre_hook(lambda module, args: seen.append(args))
    state = copy.deepcopy(model.state_dict())
    random_states = states()
    converted = convert(model, plan(model, IMAGE))
    assert states() == random_states
    assert seen == []
    assert model.calls == 0
    assert model.last is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.first.weight.requires_grad
    converted(IMAGE)
    assert len(seen) == 2


def test_a_hook_that_belongs_to_the_model_is_kept():
    """As in timm's FeatureHookNet: the model's output is what its own hook collected."""

    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net.Loop()
            self.collected = []
            self.body.convs[0].register_forward_hook(self.collect)

        def collect(self, module, args, output):
            self.collected.append(output)

        def forward(self, x):
            self.collected.clear()
            self.body(x)
            return torch.cat(self.collected)

    model = Collecting()
    decided = plan(model, IMAGE)
    assert decided["body.convs.0"].reason == "has hooks that would be lost"
    assert decided["body.convs.1"].action is Action.REPLACE
    assert model.collected == []
    assert convert(model, decided)(IMAGE).shape == (1, 32, 20, 20)


RUN_ONCE = {
    "hooks, installed by a function": (net.LazyHooks, "blocks.0.conv"),
    "hooks, closures": (net.LazyClosures, "blocks.0.conv"),
    "hooks, objects": (net.LazyObjects, "blocks.0.conv"),
    "hooks before, with keywords": (net.LazyPreHooks, "blocks.0.conv"),
    "tables": (net.Caching, "conv"),
    "locks and generators": (net.Uncopyable, "conv"),
    "accelerate": (lambda: accelerated(net.Loop()), "convs.0"),
}


def accelerated(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def attributes(model):
    """What a run changes: which objects they are, and how much they hold."""
    return {key: (id(value), len(value) if isinstance(value, list | dict) else 0) for key, value in vars(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", RUN_ONCE)
def test_a_model_that_ran_once_is_planned_like_one_that_did_not(case):
    make, name = RUN_ONCE[case]
    model = make().eval()
    expected = plan(model, IMAGE)
    assert expected[name].action is Action.REPLACE
    shape = model(IMAGE).shape
    before, seen = attributes(model), []
    for module in (model, *model.children()):
        if not isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args: seen.append(args))
    assert plan(model, IMAGE) == expected
    assert seen == []
    assert {key: value for key, value in attributes(model).items() if "hooks" not in key} == {
        key: value for key, value in before.items() if "hooks" not in key
    }
    if "generators" in case:
        assert list(model.steps) == [0, 1, 2]
        assert model.local.calls == 1
        assert convert(model, expected, inplace=True)(IMAGE).shape == shape
        return
    converted = convert(model, expected)
    before = attributes(model)
    assert converted(IMAGE).shape == shape
    assert attributes(model) == before
    assert len(seen) == 1  # the user's hook goes with the model that is handed over


def raising(*given):
    raise AssertionError("called")


class Watcher:
    """A user's object that listens."""

    def listen(self, *given):
        raise AssertionError("called")

    __call__ = listen


LISTENERS = {
    "a function": raising,
    "a lambda": lambda *given: 1 / 0,
    "a method": Watcher().listen,
    "an object": Watcher(),
    "a partial": functools.partial(raising, 1),
    "a closure of a helper": (lambda kept: lambda *given: kept.append(1 / 0))([]),
}


def every_registration(model):
    place = model.blocks[0] if isinstance(model, net.LazyHooks) else model
    yield from (place.register_forward_hook, place.register_forward_pre_hook, place.register_full_backward_hook)
    yield from (nn.modules.module.register_module_forward_hook, nn.modules.module.register_module_forward_pre_hook)


@pytest.mark.slow
@pytest.mark.parametrize("case", LISTENERS)
@pytest.mark.parametrize("make", [net.LazyHooks, net.Stateful])
def test_a_users_hook_is_never_called(case, make):
    model = make()
    expected = plan(model, IMAGE)
    model(IMAGE)
    handles = [register(LISTENERS[case]) for register in every_registration(model)]
    try:
        assert plan(model, IMAGE) == expected
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_for_all_modules_are_called_in_other_threads_meanwhile():
    seen = []
    waiting, done = threading.Event(), threading.Event()

    class Waits(net.Loop):
        def forward(self, x):
            waiting.set()
            assert done.wait(60)
            return super().forward(x)

    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(type(module)))
    try:
        with ThreadPoolExecutor(1) as pool:
            planned = pool.submit(plan, Waits(), IMAGE)
            assert waiting.wait(60)
            nn.Identity()(IMAGE)
            done.set()
            planned.result()
        nn.ReLU()(IMAGE)
    finally:
        handle.remove()
    assert seen == [nn.Identity, nn.ReLU]


@pytest.mark.slow
def test_a_segformer_that_ran_once_is_planned_like_a_fresh_one():
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2]}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, **sizes
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    image = torch.randn(1, 3, 32, 32)
    expected = plan(model, image)
    shape = model(image).logits.shape
    assert any(module._forward_hooks for module in model.modules())
    assert plan(model, image) == expected
    assert expected.replaced
    converted = convert(model, expected)
    assert converted(image).logits.shape == shape
    assert len(converted(image, output_hidden_states=True).hidden_states) == 2


# what the model demands: (whether all parameters are frozen, what the plan notes)
DEMANDS = {
    net.without_gradients: (False, "The model only runs without gradients: its activations are those of its"),
    net.in_inference_mode: (False, "The model only runs in inference mode"),
    net.in_training_mode: (False, "The model only runs in training mode"),
    net.to_numpy: (False, "The model only runs without gradients"),
    net.frozen: (True, "The model only runs with its parameters' own requires_grad"),
    net.scaled_in_place: (False, "The model only runs with its parameters' own requires_grad"),
    net.backward: (False, None),
    net.gradient: (False, None),
    net.unwatched: (False, "own requires_grad: its MACs and activations are those of its convolutions alone; convol"),
}


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: demand.__name__)
def test_a_model_is_run_as_it_demands(demand):
    is_frozen, note = DEMANDS[demand]
    model = net.Demanding(demand).train(demand is net.in_training_mode)
    if is_frozen:
        model.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    decided = plan(model, IMAGE)
    assert decided["conv"].action is Action.REPLACE
    assert [text for text in decided.notes if note and note in text] or note is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert 0 < decided.after.params < decided.before.params
    assert 0 < decided.after.macs < decided.before.macs
    assert decided.after.activation_bytes > 0
    converted = convert(model, decided)
    modes = {net.without_gradients: torch.no_grad, net.to_numpy: torch.no_grad}
    with {**modes, net.in_inference_mode: torch.inference_mode}.get(demand, torch.enable_grad)():
        assert converted(IMAGE).shape == (1, 32, 20, 20)
    assert measure(model, IMAGE).params == decided.before.params


def test_a_reversible_network_is_planned_and_trains():
    model = net.Reversible()
    decided = plan(model, IMAGE)
    assert [site.name for site in decided.replaced] == ["blocks.0.conv", "blocks.1.conv"]
    converted = convert(model, decided)
    converted(IMAGE).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


class Decoder(nn.Module):
    """Takes as many features as it has convolutions."""

    def __init__(self, features=2):
        super().__init__()
        self.features = features
        self.first = nn.Conv2d(3, 32, 1)
        self.decoder = nn.Module()
        self.decoder.forward = lambda features: features[2] + features[0]

    def forward(self, x):
        return self.decoder([self.first(x)] * self.features)


# no advice but what is known to help: (model, input, what the error ends in)
FAILURES = {
    "too few features": (Decoder(), IMAGE, "list index out of range; so does the model itself with this input"),
    "a fault of its own": (net.Demanding(lambda model, x: 1 / 0), IMAGE, "division by zero; so does the model itself"),
    "no room for a kernel": (nn.Sequential(nn.Conv2d(3, 3, 7)), IMAGE[..., :4, :4], "try a larger --input-size"),
    "no room to pool": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(32)), IMAGE, "try a larger --input-size"),
    "no room to reflect": (nn.Sequential(net.conv(3, padding=9, padding_mode="reflect")), IMAGE[..., :8], "larger"),
    "nothing left": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.AvgPool2d(20), nn.AvgPool2d(2)), IMAGE, "larger --input"),
    "one pixel to normalize": (nn.Sequential(nn.Conv2d(3, 3, 20), nn.InstanceNorm2d(3)), IMAGE, "larger --input-size"),
    "another size for a linear layer": (
        nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(99, 3)),
        IMAGE,
        "it takes 99 features and was given 400",
    ),
    "without gradients, and wrong": (net.Demanding(net.without_gradients), IMAGE[:, :1], "takes 3 channels and was gi"),
    "a TypeError inside": (net.Demanding(lambda model, x: None + 1), IMAGE, "so does the model itself with this input"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_advice_is_given_only_where_the_cause_is_known(case):
    model, image, words = FAILURES[case]
    with pytest.raises(UsageError) as caught:
        plan(model, image)
    message = str(caught.value)
    assert words in message
    assert ("input-size" in message) == ("larger" in words)
    assert "\n" not in message


def test_functional_sites_make_a_graph_module():
    model = net.Functions().eval()
    decided = plan(model, IMAGE, functional=True)
    assert [site.name for site in decided.replaced] == ["twice.conv2d()", "once.conv2d()"]
    converted = convert(model, decided)
    assert isinstance(converted, torch.fx.GraphModule)
    assert isinstance(converted.twice.ddf_conv2d, DDFConv2d)
    assert "twice.weight" not in dict(converted.named_parameters())
    assert converted(IMAGE).shape == model(IMAGE).shape
    cost = measure(converted, IMAGE)
    assert (cost.params, cost.macs) == (decided.after.params, decided.after.macs)
    assert [step.names for step in recorded(converted).replaced] == [("twice.conv2d()",), ("once.conv2d()",)]
    with pytest.raises(UsageError, match="cannot be replaced in place"):
        convert(model, decided, inplace=True)
    assert recorded(model) is None
    decided["twice.conv2d()"].skip()
    assert "twice.weight" in dict(convert(model, decided).named_parameters())


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(net.conv())


class Boom(net.Loop):
    def forward(self, x):
        raise RuntimeError("boom\nand more")


REFUSED = {
    "a ScriptModule": (scripted, IMAGE, "a ScriptModule has no Python modules to replace: convert the model first"),
    "compiled": (
        lambda: torch.compile(net.Loop(), backend="eager"),
        IMAGE,
        r"OptimizedModule: convert its \._orig_mod",
    ),
    "no module": (lambda: print, IMAGE, "expected a torch.nn.Module, got builtin"),
    "raises": (Boom, IMAGE, r"Boom does not accept an input of 3x20x20: its forward \(Boom\) failed: boom; "),
    "an argument is missing": (
        net.ManyInputs,
        IMAGE,
        "ManyInputs does not accept .*missing .*'mask'.* or a dict of them by name",
    ),
    "an argument too many": (net.Loop, (IMAGE, IMAGE), "Loop does not accept .*positional arguments"),
    "a lazy convolution": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), IMAGE, "0.weight is lazy and has no shape yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plannable_model_is_refused_in_one_line(case):
    make, example, words = REFUSED[case]
    with pytest.raises(UsageError, match=words) as caught:
        plan(make(), example)
    assert "\n" not in str(caught.value)


def test_a_lazy_convolution_that_ran_is_replaced():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.LazyConv2d(32, 3))
    model(IMAGE)
    assert plan(model, IMAGE)["1"].action is Action.REPLACE


def test_a_script_module_within_is_left_alone():
    model = nn.Sequential(net.conv(3), scripted_relu(), nn.Conv2d(32, 32, 3))
    decided = plan(model, IMAGE)
    assert decided["2"].action is Action.REPLACE
    assert convert(model, decided)(IMAGE).shape == model(IMAGE).shape


def scripted_relu():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.ReLU())


def test_a_converted_model_says_so_and_is_safe_to_convert():
    once = convert(net.Loop(), example_input=IMAGE)
    decided = plan(once, IMAGE)
    assert decided["convs.0"].reason == "already converted: DDF + 1x1"
    assert decided.replaced == []
    twice = convert(once, decided)
    assert recorded(twice).replaced == recorded(once).replaced
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
