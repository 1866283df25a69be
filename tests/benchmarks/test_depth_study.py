"""The study of depth upsampling (benchmarks/depth_motorcycle.py), on a drawn scene."""

import sys
import types

import depth_motorcycle as study
import numpy as np
import pytest
import torch

from ddf_convert.depth.lowres import downsample
from ddf_convert.errors import UsageError


def make_scene(width=160):
    """Stripes at an angle, near and far, with a few holes."""
    rows, columns = np.mgrid[0:48, 0:width]
    near = (columns + rows // 2) % 40 < 20
    disparity = torch.from_numpy(np.where(near, 40.0, 20.0).astype(np.float32))[None]
    disparity[0, ::7, ::11] = 0
    photo = torch.from_numpy((np.where(near, 200, 60)[None] + np.zeros((3, 1, 1))).astype(np.uint8))
    return study.ScenePart(photo, disparity)


class IdentityFilters:
    """Replaces OpenCV's extra modules, which not every machine has."""

    @staticmethod
    def guidedFilter(guide, image, radius, eps):  # noqa: N802  as OpenCV has it
        return image

    @staticmethod
    def jointBilateralFilter(joint, image, diameter, color, space):  # noqa: N802
        assert joint.shape == image.shape
        return image


@pytest.fixture
def opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(ximgproc=IdentityFilters))


def test_the_parts_of_the_scene_do_not_overlap():
    whole = study.ScenePart(torch.arange(300).expand(3, 32, 300), torch.arange(1.0, 301.0).expand(1, 32, 300))
    learned, tested = study.split(whole)
    assert learned.disparity.max() == 180
    assert tested.disparity.min() > 180
    assert tested.disparity.shape[1:] == (32, 112)
    chosen_on, strip = study.split(whole, choosing=True)
    assert chosen_on.disparity.max() == 84
    assert (strip.disparity.min(), strip.disparity.max()) == (85, 180)


def test_interpolation_puts_pixels_where_they_were_taken():
    ramp = torch.arange(1.0, 65.0).expand(1, 32, 64)
    low = downsample(ramp[None], 8)[0]
    linear = study.interpolate(ramp, low, 8, "bilinear")
    torch.testing.assert_close(linear[..., 16:-16], ramp[..., 16:-16])
    cubic = study.interpolate(ramp, low, 8, "bicubic")
    torch.testing.assert_close(cubic[..., 3::8, 3::8], low)


def test_joint_bilateral_upsampling_filters_the_measurements_alone(opencv):
    part = make_scene(32)
    low = part.small(4)
    photo = part.guide
    found = study.joint_bilateral(photo, low, 4, space=1.0, color=0.1, of="measurements")
    torch.testing.assert_close(found, study.interpolate(photo, low, 4, "bilinear"))


def test_a_missing_opencv_is_an_error_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="pip install"):
        study.opencv()
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace())
    with pytest.raises(UsageError, match="extra modules"):
        study.opencv()


@pytest.mark.slow
def test_the_whole_study(opencv, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "CROP", 16)
    monkeypatch.setattr(study, "PICTURE_FACTOR", 4)
    divided = study.split(make_scene())
    measured = study.MeasuredRows(tmp_path / "rows.jsonl")
    document = study.measure(divided, (4,), (0, 1), 2, measured)
    again = study.measure(divided, (4,), (0, 1), 2, study.MeasuredRows(tmp_path / "rows.jsonl"))
    assert again["rows"] == document["rows"]  # and nothing was trained again
    assert again["seconds"] == document["seconds"]
    rows = document["rows"]
    assert set(rows) == {baseline.name for baseline in study.BASELINES} | {network.name for network in study.NETWORKS}
    assert rows["bilinear"]["4"]["rmse"] < rows["nearest"]["4"]["rmse"]
    assert len(rows["DDF-Up-Net"]["4"]["seeds"]) == 2
    assert rows["DDF-Up-Net"]["4"]["untrained"][0] < rows["joint convolutions"]["4"]["untrained"][0]
    text = "\n".join(study.page(document))
    assert "| DDF-Up-Net |" in text
    assert "the best peer is" in text
    assert study.picture(divided, 2, measured).startswith(b"\x89PNG")
    assert study.plot(document)


def test_both_networks_of_the_study_are_about_as_large():
    ours, theirs = (
        sum(parameter.numel() for parameter in network.build(8, 0).parameters()) for network in study.NETWORKS
    )
    assert abs(ours / theirs - 1) < 0.06
