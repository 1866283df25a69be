"""DDF-Up-Net and the network that it is compared with."""

import pytest
import torch
import torch.nn.functional as F

from ddf_convert.models import DDFUpNet, JointConvUpNet
from ddf_convert.models.ddf_upnet import SAMPLINGS, SCALE_FACTORS, interpolation_filters, similarity_pyramid
from ddf_convert.models.depth_holes import fill_holes, moments

NETWORKS = (DDFUpNet, JointConvUpNet)
SMALL = {"width": 4, "guide_width": 4, "head_width": 4}


def example(factor, height=5, width=7, batch=2):
    generator = torch.Generator().manual_seed(0)
    depth = 1 + torch.rand(batch, 1, height, width, generator=generator)
    return depth, torch.rand(batch, 3, factor * height, factor * width, generator=generator)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("factor", SCALE_FACTORS)
def test_every_factor_and_odd_sizes(network, factor):
    depth, rgb = example(factor, 3, 5)
    model = network(factor, **SMALL)
    assert model(depth, rgb).shape == (2, 1, 3 * factor, 5 * factor)


def test_a_single_pixel_is_enough():
    assert DDFUpNet(2, **SMALL)(*example(2, 1, 1)).shape == (2, 1, 2, 2)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_untrained_network_keeps_a_flat_map_flat(network, sampling):
    _, rgb = example(8)
    depth = torch.full((2, 1, 5, 7), 3.0)
    depth[0, 0, 2, 2] = 3.3  # or there is nothing to normalize by
    depth[1, 0, 2, 2] = float("nan")
    found = network(8, sampling=sampling, **SMALL)(depth, rgb)
    torch.testing.assert_close(found[1], torch.full((1, 40, 56), 3.0))
    torch.testing.assert_close(found[0, 0, 0, 0].item(), 3.0, rtol=1e-3, atol=0)


def test_untrained_joint_convolutions_are_bilinear_interpolation():
    depth, rgb = example(2)
    found = JointConvUpNet(2, sampling="mean", **SMALL)(depth, rgb)
    torch.testing.assert_close(found, F.interpolate(depth, scale_factor=2, mode="bilinear"))


def test_a_measurement_stays_where_it_was_taken():
    """A ramp, of which the pixel (s - 1) // 2 of each cell was taken, comes back as that ramp."""
    ramp = (1 + torch.arange(64.0)).view(1, 1, 1, -1).expand(1, 1, 64, 64)
    found = JointConvUpNet(4, sampling="nearest", **SMALL)(ramp[..., 1::4, 1::4], torch.rand(1, 3, 64, 64))
    torch.testing.assert_close(found[..., 8:-8], ramp[..., 8:-8])


def test_an_untrained_network_follows_the_edges_of_the_photo():
    depth = torch.ones(1, 1, 16, 16)
    depth[..., 8:] = 2.0
    truth = torch.ones(1, 1, 64, 64)
    truth[..., 34:] = 2.0  # within a cell of the small map
    depth[..., 8] = 1.0
    rgb = (truth - 1).expand(1, 3, 64, 64)
    torch.manual_seed(0)
    guided = DDFUpNet(4)(depth, rgb)
    plain = DDFUpNet(4)(depth, torch.zeros_like(rgb))
    error, without = ((found - truth).square().mean().item() for found in (guided, plain))
    assert error < without


@pytest.mark.parametrize("network", NETWORKS)
def test_units_do_not_matter(network):
    depth, rgb = example(4)
    model = trained_a_little(network(4, **SMALL))
    torch.testing.assert_close(model(1000 * depth, rgb), 1000 * model(depth, rgb), rtol=1e-4, atol=0.05)


def trained_a_little(model):
    """Every parameter off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def test_every_kind_of_hole_is_the_same_and_no_hole_comes_out():
    depth, rgb = example(4)
    model = trained_a_little(DDFUpNet(4, **SMALL))
    found = []
    for hole in (0.0, -1.0, float("nan"), float("inf")):
        holed = depth.clone()
        holed[:, :, 1:3, 2:5] = hole
        found.append(model(holed, rgb))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].isfinite().all()
    assert not torch.equal(found[0], model(depth, rgb))


def test_nothing_but_holes_gives_finite_numbers():
    _, rgb = example(2)
    assert DDFUpNet(2, **SMALL)(torch.zeros(2, 1, 5, 7), rgb).isfinite().all()


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_reach_every_parameter_once_it_has_moved(network):
    depth, rgb = example(4)
    model = trained_a_little(network(4, **SMALL))
    depth.requires_grad_()
    model(depth, rgb.requires_grad_()).square().sum().backward()
    unreached = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert [name for name in unreached if "channel_branch" not in name] == []  # whose squeeze has one ReLU here
    assert depth.grad.isfinite().all()
    assert rgb.grad.any()


def test_an_optimizer_learns():
    depth, rgb = example(2, 6, 6)
    target = F.interpolate(depth, scale_factor=2, mode="nearest")
    model = DDFUpNet(2, **SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(depth, rgb) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_autocast(network):
    depth, rgb = example(4)
    model = trained_a_little(network(4, **SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(depth, rgb)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(depth, rgb), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_torch_compile():
    depth, rgb = example(2, 3, 4, 1)
    model = trained_a_little(DDFUpNet(2, blocks=0, **SMALL))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(depth, rgb), model(depth, rgb))
    compiled(depth, rgb).sum().backward()


def test_both_networks_are_about_as_large():
    for factor in SCALE_FACTORS:
        ours, theirs = (sum(p.numel() for p in network(factor).parameters()) for network in NETWORKS)
        assert abs(theirs / ours - 1) < 0.06


def test_arguments_rebuild_the_network():
    model = DDFUpNet(4, **SMALL, heads=2, sampling="mean")
    again = DDFUpNet(**model.arguments)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(*example(4)), model(*example(4)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale_factor": 3}, "one of 2, 4, 8 and 16"),
        ({"width": 1}, "width must be 2 or more"),
        ({"heads": 5}, "heads must divide width"),
        ({"blocks": -1}, "blocks must be 0"),
        ({"sampling": "middle"}, "sampling must be one of"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        DDFUpNet(**arguments)


def test_shapes_that_do_not_fit():
    depth, rgb = example(4)
    model = DDFUpNet(8, **SMALL)
    with pytest.raises(ValueError, match=r"rgb must be \(B, 3, 8\*h, 8\*w\)"):
        model(depth, rgb)
    with pytest.raises(ValueError, match=r"depth must be \(B, 1, h, w\)"):
        model(depth[:, 0], rgb)
    with pytest.raises(ValueError, match="squeeze"):
        JointConvUpNet(squeeze=0)


def test_color_similarity():
    rgb = torch.zeros(1, 3, 4, 4)
    rgb[..., 2:] = 1.0
    similarity = similarity_pyramid(rgb, 1, "mean")[0].view(4, 9, 2, 2)
    assert similarity[0, 4, 0, 0] == 1  # itself
    assert similarity[0, 5, 0, 0] < 1e-6  # across the edge
    assert similarity[1, 3, 0, 0] == 1  # the border, repeated


def test_interpolation_sums_to_one():
    for onto_first in (False, True):
        torch.testing.assert_close(interpolation_filters(onto_first).sum((-2, -1)), torch.ones(4))


def test_holes_are_filled_from_around():
    depth = torch.zeros(1, 1, 4, 4)
    depth[0, 0, 0, 0], depth[0, 0, 3, 3] = 1.0, 3.0
    filled, known = fill_holes(depth)
    assert known.sum() == 2
    assert filled[0, 0, 0, 0] == 1
    assert filled[0, 0, 1, 1] < filled[0, 0, 2, 2]
    assert (filled >= 1).all()
    assert (filled <= 3).all()
    mean, deviation = moments(filled, known)
    assert (mean.item(), deviation.item()) == (2.0, 1.0)
