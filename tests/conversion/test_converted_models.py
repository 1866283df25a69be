"""Converted models work with the usual tools, and conversion leaves the original unchanged."""

import copy
import io
import itertools
import pickle
import random
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import converted_networks as net
from support.paths import TESTS
from support.tolerances import deep
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import multiprocessing, nn
from torch.utils.checkpoint import checkpoint

import ddf_convert as ddf
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d

TIMM = ["mobilenet", "basic blocks", "bottlenecks"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small; and sums, in other processes too, have one order
    yield
    torch.set_num_threads(threads)


def assert_near(ours, theirs):
    """Equal but for rounding in a network: each tensor's error is small beside its norm."""
    for one, other in zip(ours, theirs, strict=True):
        error = (one - other).norm() / other.norm().clamp_min(1e-6)
        assert error <= deep(one.dtype), float(error)


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", net.FAMILIES)
def test_every_family_has_the_ddf_layers_that_these_tests_are_about(family):
    model, image = net.converted(family), net.images()
    layers = net.ddf_layers(model)
    assert len(layers) == net.FAMILIES[family][2]
    for layer in layers.values():  # and each of them counts
        before = model(image)
        with torch.no_grad():
            layer.get_parameter("channel_branch.4.std" if isinstance(layer, DDF2d) else "mix.weight").mul_(2)
        assert not torch.allclose(model(image), before, rtol=1e-3)


# --- copies, wrappers, compilers: the same outputs and the same gradients ---------------------------------------------


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def through_a_state_dict(model, family):
    torch.manual_seed(5)
    other = net.convert(net.FAMILIES[family][0](), family)
    assert str(other.load_state_dict(model.state_dict(), strict=True)) == "<All keys matched successfully>"
    return other


def functional(model):
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    emptied = copy.deepcopy(model).to("meta")  # so that nothing but the state given can be used
    return lambda image: torch.func.functional_call(emptied, state, image)


def checkpointed(model):
    return lambda image: checkpoint(model, image, use_reentrant=False)


def compiled(model, family):
    """Whole. AOTAutograd takes long, so it has one family; Inductor longer still: see tests/layers/test_ddf.py.

    So does Dynamo for many layers: the other families are left to `make test-long`.
    """
    return torch.compile(model, backend="aot_eager" if family == "basic blocks" else "eager", fullgraph=True)


WAYS = {
    "deepcopy": (lambda model, family: copy.deepcopy(model), assert_equal),
    "pickle": (lambda model, family: pickle.loads(pickle.dumps(model)), assert_equal),
    "torch.save": (lambda model, family: through_a_file(model), assert_equal),
    "state dict": (through_a_state_dict, assert_equal),
    "functional_call": (lambda model, family: functional(model), assert_equal),
    "checkpoint": (lambda model, family: checkpointed(model), assert_equal),
    "compiled": (compiled, assert_near),
}
LONG = [("compiled", "mobilenet"), ("compiled", "bottlenecks"), ("compiled", "unet")]
CASES = [
    pytest.param(*case, marks=pytest.mark.long if case in LONG else ())
    for case in itertools.product(WAYS, net.FAMILIES)
]
if not torch.cuda.is_available():  # it would want the model on the GPU
    WAYS["DataParallel"] = (lambda model, family: nn.DataParallel(model), assert_equal)
    CASES.append(pytest.param("DataParallel", "bottlenecks"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "family"), CASES)
def test_outputs_and_gradients_stay(way, family):
    """In training mode, and the outputs in evaluation mode, which follow the statistics of that pass."""
    change, compare = WAYS[way]
    model = net.converted(family).train()
    changed = change(model, family)
    owner = changed.train() if isinstance(changed, nn.Module) else model
    theirs = net.gradients(owner, changed, net.images())
    ours = net.gradients(model, model, net.images())
    assert len(ours) == 2 + len(list(model.parameters()))
    compare(theirs, ours)
    if owner is not model:
        compare(owner.eval()(net.images()), model.eval()(net.images()))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_no_memory(way):
    model = net.converted("unet")
    changed = WAYS[way][0](model, "unet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in changed.state_dict().values():
            value.add_(1)
    assert_equal(model.state_dict(), before)


# These take longest, and are made of what the others are made of.
LONG_TO_EXPORT = [pytest.param(family, marks=pytest.mark.long) for family in ("mobilenet", "bottlenecks")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["basic blocks", "unet", *LONG_TO_EXPORT])
def test_exports_with_any_number_of_images(family):
    model = net.converted(family)
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(model, (net.images(2),), dynamic_shapes=(batch,), strict=False)
    targets = [node.target for node in exported.graph.nodes]
    assert targets.count(torch.ops.ddf_convert.ddf.default) == net.FAMILIES[family][2]
    for count in (2, 1, 5):
        assert_near(exported.module()(net.images(count)), model(net.images(count)))


@pytest.mark.slow
def test_an_ensemble_of_one_model():
    """Weights of two models through the modules of one, which keeps its own."""
    model, other = net.converted("basic blocks"), net.convert(net.build("basic blocks"), "basic blocks").eval()
    ours, theirs = model(net.images()), other(net.images())
    assert not torch.allclose(ours, theirs)
    assert torch.equal(torch.func.functional_call(model, other.state_dict(), net.images()), theirs)
    assert torch.equal(model(net.images()), ours)


# --- precision and layout ---------------------------------------------------------------------------------------------

# By how much a model may multiply its type's rounding error; a DDF layer, as a product of three features, adds to it.
GROWTH = {"mobilenet": 500, "basic blocks": 50, "bottlenecks": 50, "unet": 50}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, "autocast"], ids=str)
@pytest.mark.parametrize("family", net.FAMILIES)
def test_errors_stay_near_the_rounding_of_every_dtype(family, dtype):
    with torch.no_grad():
        exact = net.converted(family).double()(net.images().double())
        model, image = net.converted(family), net.images()
        if dtype == "autocast":
            dtype = torch.bfloat16
            with torch.autocast("cpu", dtype):
                output = model(image)
        else:
            output = model.to(dtype)(image.to(dtype))
            assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {dtype}
    assert output.dtype == dtype
    assert output.isfinite().all()
    error = (output - exact).norm() / exact.norm()
    assert error < min(0.9, GROWTH[family] * torch.finfo(dtype).eps)  # strangers are 1.4 apart


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("family", net.FAMILIES)
def test_every_layout_gives_the_same_gradients_and_is_kept(family, layout):
    model, usual = net.converted(family).double().to(memory_format=layout), net.converted(family).double()
    maps = []
    for layer in net.ddf_layers(model).values():
        layer.register_forward_hook(lambda layer, inputs, output: maps.append(output))
    image = net.images().double().to(memory_format=layout)
    expected = net.gradients(usual, usual, net.images().double())
    assert_near(net.gradients(model, model, image), expected)
    assert len(maps) == net.FAMILIES[family][2]
    assert all(output.is_contiguous(memory_format=layout) for output in maps)
    assert all(output.shape[1] > 1 < output.shape[-1] for output in maps)  # else every layout is both


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["ddf", "others"])
@pytest.mark.parametrize("family", net.FAMILIES)
def test_gradients_of_what_is_not_frozen_stay_the_same(family, trained):
    model = net.converted(family).train()
    names = [name for name, _ in model.named_parameters()]
    everything = dict(zip(names, net.gradients(model, model, net.images())[2:], strict=True))
    model.requires_grad_(trained == "others")
    for layer in net.ddf_layers(model).values():
        layer.requires_grad_(trained == "ddf")
    kept = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert 0 < len(kept) < len(names)
    found = net.gradients(model, model, net.images())[2:]
    assert_equal(dict(zip(kept, found, strict=True)), {name: everything[name] for name in kept})
    model.requires_grad_(False)
    assert not model(net.images()).requires_grad


@pytest.mark.parametrize("family", net.FAMILIES)
def test_only_training_mode_mixes_images_and_updates_statistics(family):
    model, image = net.converted(family), net.images(4)
    before = copy.deepcopy(model.state_dict())
    assert_near(model(image)[:1], model(image[:1]))  # no image sees the others
    assert_equal(model.state_dict(), before)
    model.train()
    assert all(module.training for module in model.modules())
    assert not torch.allclose(model(image)[:1], model(image[:2])[:1])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    running = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert changed == running
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("family", TIMM)
def test_timms_gradient_checkpointing_gives_the_same_gradients(family):
    model = net.converted(family).train()
    expected = net.gradients(model, model, net.images())
    calls = dict.fromkeys(net.ddf_layers(model), 0)

    def count(name):
        def hook(layer, inputs, output):
            calls[name] += 1

        return hook

    for name, layer in net.ddf_layers(model).items():
        layer.register_forward_hook(count(name))
    model.set_grad_checkpointing(True)
    assert_equal(net.gradients(model, model, net.images()), expected)
    assert all(count == (1 if name.startswith("conv1") else 2) for name, count in calls.items())  # timm keeps the stem
    assert 2 in calls.values()


def test_timms_optimizers_decay_only_what_multiplies_features():
    """Decay is for what multiplies features, not for biases and the scale of FilterNorm, as for any norm."""
    model = net.converted("basic blocks").train()
    rate, decay = 0.1, 0.5
    optimizer = create_optimizer_v2(model, "momentum", lr=rate, weight_decay=decay, momentum=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    prefix = "layer2.0.conv1."
    assert {name.removeprefix(prefix) for name in decayed if name.startswith(prefix)} == {
        "ddf.spatial_branch.0.weight",
        "ddf.channel_branch.1.weight",
        "ddf.channel_branch.3.weight",
        "mix.weight",
    }
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(net.images()).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] - rate * (parameter.grad + decay * (name in decayed) * before[name])
        torch.testing.assert_close(parameter.detach(), expected)
        assert parameter.grad.any()


def test_timms_moving_average_covers_the_new_layers():
    model = net.converted("bottlenecks")
    average = ModelEmaV3(model, decay=0.75)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    average.update(model)
    expected = {
        name: before[name] * 0.75 + value * 0.25 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    torch.testing.assert_close(average.module.state_dict(), expected)
    assert set(net.ddf_layers(average.module)) == set(net.ddf_layers(model))
    assert not average.module.training


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.long
def test_two_processes_find_the_mean_of_their_gradients(tmp_path):
    families = ("basic blocks", "unet")
    multiprocessing.spawn(net.train_in_parallel, (families, str(tmp_path)), nprocs=2)
    for family in families:
        first, second = (torch.load(tmp_path / f"{family} {rank}.pt") for rank in range(2))
        assert_equal(first, second)
        halves = []
        for image in net.images(4).split(2):
            model = net.converted(family).train()
            model(image).square().mean().backward()
            halves.append([parameter.grad for parameter in model.parameters()])
        names = [name for name, _ in model.named_parameters()]
        mean = dict(zip(names, ((a + b) / 2 for a, b in zip(*halves, strict=True)), strict=True))
        assert_near(first.values(), mean.values())
        assert not torch.allclose(*(half[0] for half in halves), rtol=0.1)


# --- timm's methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TIMM)
def test_timms_features_and_head_work_on(family):
    model, original, image = net.converted(family), net.build(family).eval(), net.images()
    features, output = model.forward_features(image), model(image)
    assert features.shape == original.forward_features(image).shape
    assert torch.equal(model.forward_head(features), output)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert torch.equal(model.forward_features(image), features)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(image), model.forward_head(features, pre_logits=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", TIMM)
def test_features_only_gives_the_intermediates(family):
    """A converted feature extractor with the weights of the converted model gives that model's features."""
    model, original, image = net.converted(family), net.build(family).eval(), net.images()
    final, features = model.forward_intermediates(image)
    assert torch.equal(final, model.forward_features(image))
    assert [feature.shape for feature in features] == [f.shape for f in original.forward_intermediates(image)[1]]
    extractor = net.convert(net.FAMILIES[family][0](features_only=True), family).eval()
    assert extractor.feature_info.channels() == [feature.shape[1] for feature in features]
    state = model.state_dict()
    extractor.load_state_dict({name: state[name] for name in extractor.state_dict()}, strict=True)
    assert net.ddf_layers(extractor).keys() == net.ddf_layers(model).keys()
    assert_equal(list(extractor(image)), list(features))


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_process_loads_and_restores(tmp_path):
    """A timm model by its name, a network of one's own into a fresh one."""
    for family in ("mobilenet", "unet"):
        ddf.save(net.converted(family), tmp_path / family)
    script = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import ddf_convert as ddf, torch
from support import converted_networks as net
torch.set_num_threads(1)
models = [ddf.load("mobilenet"), ddf.restore(net.UNet(), "unet").eval()]
torch.save([model(net.images()) for model in models], "outputs.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    expected = [net.converted(family)(net.images()) for family in ("mobilenet", "unet")]
    assert_equal(torch.load(tmp_path / "outputs.pt"), expected)


# --- nothing is harmed ------------------------------------------------------------------------------------------------


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
HOOKED = ("", "encoder.0", "encoder.0.1", "head")  # the model, a container, a norm, a convolution that stays


def motley():
    """A U-Net in which every module and tensor may be unlike its neighbor; and the calls of its hooks."""
    torch.manual_seed(0)
    model, calls = net.UNet().train(), []
    model.middle = nn.Sequential(Cast(torch.bfloat16), net.stage(24, 32).bfloat16(), Cast(torch.float32))
    model.decoder[0].eval()
    model.encoder[1][1].eval()
    model.encoder[0].requires_grad_(False)
    model.decoder[1][0].weight.requires_grad_(False)
    model.decoder[1][1].bias.requires_grad_(False)
    model.register_buffer("mean", torch.randn(3))
    model.encoder[1].register_buffer("grid", torch.randn(2, 2), persistent=False)
    for name in HOOKED:
        for kind in HOOKS:
            register = getattr(model.get_submodule(name), f"register_{kind}_hook")
            register(lambda module, *values, kind=kind: calls.append((kind, module, values)) and None)
    return model, calls


def tensors(model):
    """Parameters and buffers by name, those outside state dicts too."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def contents(tensor):
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def hooks(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return [list(getattr(module, kind).values()) for kind in kinds]


WATCHED = {
    "modules": lambda model: {name: id(part) for name, part in model.named_modules(remove_duplicate=False)},
    "attributes": lambda model: {name: list(vars(part)) for name, part in model.named_modules()},
    "training": lambda model: {name: part.training for name, part in model.named_modules()},
    "hooks": lambda model: {name: hooks(part) for name, part in model.named_modules()},
    "buffers": lambda model: {name: set(part._non_persistent_buffers_set) for name, part in model.named_modules()},
    "tensors": lambda model: {name: (id(t), t.data_ptr(), t.grad) for name, t in tensors(model).items()},
    "contents": lambda model: {name: (t.dtype, t.stride(), contents(t)) for name, t in tensors(model).items()},
    "requires_grad": lambda model: {name: t.requires_grad for name, t in tensors(model).items()},
    "random states": lambda model: (random.getstate(), str(np.random.get_state()), contents(torch.get_rng_state())),
    "modes": lambda model: (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    ),
}


def plan(model):
    return ddf.plan(model, net.images(), stem=True)


def convert(model):
    return ddf.convert(model, plan(model))


def train_the_copy(model):
    with torch.enable_grad():
        copied = convert(model)
        copied(net.images().requires_grad_()).sum().backward()
    with torch.no_grad():
        for value in tensors(copied).values():
            value.add_(1)


def unfitting(change, inplace):
    def attempt(model):
        decided = plan(model)
        change(decided)
        with pytest.raises(UsageError):
            ddf.convert(model, decided, inplace=inplace)

    return attempt


def rename_the_last(decided):
    decided.replaced[-1].name = "decoder.7.0"


def spoil_the_last(decided):
    site = decided.replaced[-1]
    site.replacement = ddf.Replacement(layer="DDFConv2d", options={**site.replacement.options, "heads": 5})


ACTIONS = {
    "plan": plan,
    "measure": lambda model: ddf.measure(model, net.images()),
    "convert": convert,
    "as_graph": lambda model: ddf.convert(model, plan(model), as_graph=True),
    "train the copy": train_the_copy,
    "no such module": unfitting(rename_the_last, inplace=False),
    "no such module, in place": unfitting(rename_the_last, inplace=True),
    "no such layer, in place": unfitting(spoil_the_last, inplace=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
def test_the_original_is_unharmed(action):
    model, _ = motley()
    before = {what: look(model) for what, look in WATCHED.items()}
    ACTIONS[action](model)
    for what, look in WATCHED.items():
        assert look(model) == before[what], what


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "no surroundings": nullcontext,
}


@pytest.mark.slow
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_the_surroundings_stay_and_change_nothing(surrounding):
    model, _ = motley()
    expected = convert(model)
    with SURROUNDINGS[surrounding]():
        before = WATCHED["modes"](model)
        copied = convert(model)
        assert WATCHED["modes"](model) == before
    for look in ("contents", "requires_grad", "training"):
        assert WATCHED[look](copied) == WATCHED[look](expected)
    assert_equal(net.gradients(copied, copied, net.images()), net.gradients(expected, expected, net.images()))


@pytest.mark.slow
def test_another_default_dtype_changes_nothing():
    model, _ = motley()
    expected = convert(model)
    torch.set_default_dtype(torch.float64)
    try:
        copied = convert(model)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert WATCHED["contents"](copied) == WATCHED["contents"](expected)


@pytest.mark.slow
def test_the_copy_keeps_what_every_module_and_tensor_had():
    model, _ = motley()
    copied = convert(model)
    layers = net.ddf_layers(copied)
    assert len(layers) == 10
    for look in ("attributes", "training", "hooks", "buffers", "contents", "requires_grad"):
        before, after = (
            {
                name: value
                for name, value in WATCHED[look](which).items()
                if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)
            }
            for which in (model, copied)
        )
        if look == "attributes":
            after[""].remove("ddf_conversion")
        assert after == before, look
    for name, layer in layers.items():
        conv = model.get_submodule(name)
        assert {parameter.dtype for parameter in layer.parameters()} == {conv.weight.dtype}
        assert {parameter.requires_grad for parameter in layer.parameters()} == {True}
        assert {part.training for part in layer.modules()} == {conv.training}
    kinds = {
        (layer.ddf.channel_branch[4].std.dtype, layer.training, model.get_submodule(name).weight.requires_grad)
        for name, layer in layers.items()
    }
    assert len(kinds) > 3


@pytest.mark.slow
def test_parts_on_another_device_stay_there():
    model = net.UNet()
    model.middle.to("meta")
    copied = ddf.convert(model, plan(model))
    devices = {
        name: {tensor.device.type for tensor in layer.parameters()} for name, layer in net.ddf_layers(copied).items()
    }
    assert devices == {name: {"meta" if name.startswith("middle") else "cpu"} for name in devices}
    assert sum(kinds == {"meta"} for kinds in devices.values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("action", ["plan", "measure", "convert", "no such module, in place"])
def test_hooks_of_the_model_are_not_called(action):
    """They may be anyone's: append to a list, write to a file, expect numbers."""
    model, calls = motley()
    ACTIONS[action](model)
    assert calls == []


@pytest.mark.slow
def test_hooks_are_called_on_the_copy():
    model, calls = motley()
    copied = convert(model)
    calls.clear()
    copied(net.images().requires_grad_()).sum().backward()
    expected = {(kind, copied.get_submodule(name)) for name in HOOKED for kind in HOOKS}
    assert {(kind, module) for kind, module, _ in calls} == expected
    assert len(calls) == len(expected)
    tensors = [torch.utils._pytree.tree_leaves(values) for *_, values in calls]
    assert all(type(leaf) is torch.Tensor for leaves in tensors for leaf in leaves)
