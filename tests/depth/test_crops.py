"""Small maps made of large ones, errors, and crops to learn from."""

import pytest
import torch
from support.depth_scenes import error_of

from ddf_convert.depth.crops import Crops
from ddf_convert.depth.lowres import DOWNSAMPLINGS, cut_to_factor, downsample, fit
from ddf_convert.depth.maps import Unit
from ddf_convert.depth.metrics import errors, mean_rmse
from ddf_convert.recipes.schema import Augmentation


def test_nearest_takes_one_pixel_of_each_cell():
    depth = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    assert downsample(depth, 4).flatten().tolist() == [10, 14, 42, 46]  # row 1 and column 1 of 4
    assert downsample(depth, 2).flatten().tolist()[:2] == [1, 3]


def test_means_leave_holes_out():
    depth = torch.tensor([[[[0.0, 2.0, 0.0, 0.0], [4.0, float("nan"), 0.0, 0.0]]]])
    assert downsample(depth, 2, "mean").tolist() == [[[[3.0, 0.0]]]]


@pytest.mark.parametrize("how", DOWNSAMPLINGS)
def test_flat_maps_stay_flat_and_holes_stay_holes(how):
    depth = torch.full((1, 1, 16, 16), 3.0)
    depth[..., :8, :8] = 0.0
    found = downsample(depth, 8, how)
    torch.testing.assert_close(found, torch.tensor([[[[0.0, 3.0], [3.0, 3.0]]]]))


def test_padding_where_the_factor_does_not_divide():
    image = torch.zeros(3, 10, 13, dtype=torch.uint8)
    padded, depth, words = fit(image, torch.ones(1, 3, 3), 4)  # one rounded up, the other down
    assert padded.shape == (3, 12, 16)
    assert depth.shape == (1, 3, 4)
    assert depth[..., -1].sum() == 0
    assert "4 does not divide 13x10" in words
    assert fit(image[:, :8, :12], torch.ones(1, 2, 3), 4)[2] is None
    assert cut_to_factor(image, 4).shape == (3, 8, 12)


def test_sizes_that_do_not_fit():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    assert "that of a factor of 8" in error_of(fit, image, torch.ones(1, 4, 8), 4)
    assert "the same view" in error_of(fit, image, torch.ones(1, 8, 8), 8)


def test_errors_count_what_is_known():
    truth = torch.tensor([[[2.0, 0.0], [float("nan"), 4.0]]])
    found = errors(torch.tensor([[[3.0, 9.0], [9.0, 4.0]]]), truth)
    assert (found.pixels, found.mae) == (2, 0.5)
    assert found.rmse == pytest.approx(0.5**0.5)
    assert mean_rmse([found, found]) == found.rmse
    with pytest.raises(ValueError, match="holes"):
        errors(truth, torch.zeros(1, 2, 2))


# --- crops ---


class Pairs(list):
    unit = Unit("m")
    names = ("a", "b")


def test_crops_are_a_function_of_their_number():
    depth = torch.arange(1.0, 40 * 50 + 1).view(1, 40, 50)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    pairs = Pairs([(image, depth), (image, depth)])
    varied = Augmentation(scale=(0.5, 2.0), vflip=0.5, color_jitter=0.3)
    photos, depths = Crops(pairs, 16, varied, seed=3, turned=0.5).batch(5, 4)
    again, _ = Crops(pairs, 16, varied, seed=3, turned=0.5).batch(7, 2)
    assert torch.equal(photos[2:], again)
    assert photos.shape == (4, 3, 16, 16)
    assert depths.shape == (4, 1, 16, 16)
    assert photos.min() >= 0
    assert photos.max() <= 1


def test_plain_crops_show_the_pair_as_it_is():
    depth = torch.arange(1.0, 401.0).view(1, 20, 20)
    image = (depth % 256).to(torch.uint8).expand(3, 20, 20)
    photos, depths = Crops(Pairs([(image, depth)]), 8, None, seed=0).batch(0, 2)
    torch.testing.assert_close((255 * photos[:, :1]).round(), depths % 256)


def test_near_and_far_change_places():
    depth = torch.tensor([[[0.0, 1.0], [2.0, 5.0]]])
    pairs = Pairs([(torch.zeros(3, 2, 2, dtype=torch.uint8), depth)])
    _, depths = Crops(pairs, 2, Augmentation(scale=(1.0, 1.0), hflip=0), seed=0, turned=1.0).batch(0, 1)
    assert depths.tolist() == [[[[0.0, 5.0], [4.0, 1.0]]]]


def test_small_pairs_are_enlarged_by_reflection():
    depth = torch.tensor([[[1.0, 2.0, 3.0]]])
    _, depths = Crops(Pairs([(torch.zeros(3, 1, 3, dtype=torch.uint8), depth)]), 8, None, seed=0).batch(0, 1)
    assert depths[0, 0, 0].tolist() == [1, 2, 3, 3, 2, 1, 1, 2]
