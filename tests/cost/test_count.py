"""Costs: figures worked out by hand, those of the modules themselves, and that measuring changes nothing."""

import copy
import gc
import weakref

import pytest
import timm
import torch
from torch import nn

from ddf_convert.cost.count import Cost, count_parameters, measure
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d


class Attention(nn.Module):
    """Two heads over 16 tokens of width 8, and nothing else that is counted."""

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def ddf_by_hand(channels, squeeze, pixels):
    spatial = channels * 9 * pixels
    channel = channels * squeeze + squeeze * channels * 9
    return spatial + channel + 9 * channels * pixels


CASES = {
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 10, 10), 3 * 8 * 9 + 8, 2 * 100 * 8 * 27),
    "grouped": (nn.Conv2d(8, 8, 3, groups=4, bias=False), (1, 8, 6, 6), 8 * 2 * 9, 16 * 8 * 2 * 9),
    "linear": (nn.Linear(6, 4), (5, 6), 28, 5 * 24),
    "attention": (Attention(), (1, 2, 16, 8), 0, 2 * 2 * 16 * 16 * 8),
    "ddf": (DDF2d(10), (1, 10, 7, 7), 10 * 9 + 9 + 10 * 4 + 4 + 4 * 90 + 90 + 90, ddf_by_hand(10, 4, 49)),
    "ddf + 1x1": (
        DDFConv2d(10, 4, groups=2),
        (1, 10, 7, 7),
        10 * 9 + 9 + 10 * 4 + 4 + 4 * 90 + 90 + 90 + 20,
        ddf_by_hand(10, 4, 49) + 49 * 20,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("meta", torch.float64), ("cpu", torch.float16), ("meta", torch.bfloat16)],
)
def test_parameters_and_macs_by_hand(name, device, dtype):
    module, shape, params, macs = CASES[name]
    module = copy.deepcopy(module).to(device, dtype)
    cost = measure(module, torch.empty(shape, dtype=dtype))
    assert (cost.params, cost.macs) == (params, macs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_tiny_patch16_224"])
def test_known_models_cost_what_is_published(name):
    expected = {"resnet18": (11689512, 1814073344), "resnet50": (25557032, 4089184256)}
    with torch.device("meta"):
        model = timm.create_model(name)
    cost = measure(model, torch.empty(1, 3, 224, 224))
    if name in expected:
        assert (cost.params, cost.macs) == expected[name]
    else:  # 12 blocks of width 192 and 197 tokens: projections, the two attention products, patches and head
        blocks = 12 * (197 * 192 * 192 * 12 + 2 * 197 * 197 * 192)
        assert cost.macs == blocks + 196 * 192 * 768 + 192 * 1000


def test_activation_bytes_count_each_storage_once():
    # The ReLU keeps its output, which is what the second convolution keeps as its input; the first keeps the image.
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    pixels = 2 * 5 * 5
    assert measure(model, torch.empty(2, 3, 5, 5)).activation_bytes == 4 * pixels * (3 + 4)
    assert measure(model.half(), torch.empty(2, 3, 5, 5).half()).activation_bytes == 2 * pixels * (3 + 4)


def test_activation_bytes_are_those_of_a_real_run():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    image = torch.randn(1, 3, 64, 64)
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(image)
    real = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert measure(model, image).activation_bytes == sum(size for key, size in real.items() if key not in weights)


def test_measuring_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), DDF2d(4))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    with torch.inference_mode():
        measure(model, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert identities == [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    assert not model[0].weight.requires_grad
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_shared_parameter_counts_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    assert count_parameters(model) == measure(model, torch.empty(1, 4)).params == 20
    assert measure(model, torch.empty(1, 4)).macs == 32


def test_single_image_batch_norm_is_measured_in_training_mode_too():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    assert measure(model, torch.empty(1, 3, 8, 8)).macs == 12


def test_weight_norm_is_measured():
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert measure(conv, torch.empty(1, 3, 2, 2)).macs == 48


def test_lazy_parameters_are_an_error():
    for call in (count_parameters, lambda module: measure(module, torch.empty(1, 3, 8, 8))):
        with pytest.raises(UsageError, match=r"0\.weight is lazy"):
            call(nn.Sequential(nn.LazyConv2d(4, 3)))


def test_costs_add_and_subtract():
    one, two = Cost(params=1, macs=20, activation_bytes=300), Cost(params=4, macs=50, activation_bytes=600)
    assert one + two - one == two


@pytest.mark.slow
def test_measuring_frees_all_tensors():
    """What autograd saves of an operator's own output would hold itself, where no garbage collector sees it."""
    outputs = []

    class Noted(nn.Sigmoid):
        def forward(self, input):
            output = super().forward(input)
            outputs.append(weakref.ref(output))
            return output

    measure(nn.Sequential(nn.Conv2d(3, 8, 1), Noted()), torch.empty(1, 3, 8, 8))
    gc.collect()
    assert outputs
    assert [output() for output in outputs if output() is not None] == []
