"""Pairs of photos and depth maps: folders, and NYU Depth V2's file."""

import h5py
import numpy as np
import pytest
from support.depth_scenes import error_of, pair, photo, with_orientation, write_map

from ddf_convert.depth import nyu
from ddf_convert.depth.maps import Unit
from ddf_convert.depth.pairs import each, open_pairs
from ddf_convert.errors import UsageError

RANDOM = np.random.default_rng(0)


def test_a_folder_of_pairs(tmp_path):
    for number in range(4):
        pair(tmp_path, f"{number}", size=(8, 12))
    training, validation = open_pairs(tmp_path)
    assert training.names == ["0.png", "1.png", "2.png"]
    assert validation.names == ["3.png"]
    assert training.unit == Unit("mm")
    (_, image, depth), *_ = each(training)
    assert image.shape == (3, 8, 12)
    assert depth.shape == (1, 8, 12)


def test_a_divided_folder(tmp_path):
    pair(tmp_path / "train", "a", ".npy")
    pair(tmp_path / "val", "b", ".pfm")
    training, validation = open_pairs(tmp_path)
    assert (len(training), len(validation)) == (1, 1)
    assert training.unit == Unit("m")
    assert training.unit.show(1.5) == 150


def test_a_single_pair_leaves_none_to_validate_with(tmp_path):
    pair(tmp_path, "a")
    assert open_pairs(tmp_path)[1] is None


def test_folders_that_are_not_right(tmp_path):
    assert "nothing there" in error_of(open_pairs, tmp_path / "missing")
    assert "rgb is missing" in error_of(open_pairs, tmp_path)
    (tmp_path / "rgb").mkdir()
    assert "has no files" in error_of(open_pairs, tmp_path)
    pair(tmp_path, "a")
    write_map(tmp_path / "rgb" / "b.jpg", photo())
    assert "b.jpg has no partner" in error_of(open_pairs, tmp_path)
    write_map(tmp_path / "depth" / "b.npy", np.ones((8, 12)))
    assert "--unit" in error_of(open_pairs, tmp_path)
    assert len(open_pairs(tmp_path, unit="mm")[0]) == 1
    write_map(tmp_path / "rgb" / "b.png", photo())
    assert "same name" in error_of(open_pairs, tmp_path, unit="mm")


def test_a_pair_of_two_sizes(tmp_path):
    pair(tmp_path, "a")
    write_map(tmp_path / "depth" / "a.png", np.full((4, 6), 9, np.uint16))
    assert "12x8" in error_of(open_pairs(tmp_path)[0].__getitem__, 0)


def test_a_photo_that_fits_no_more_once_it_is_turned(tmp_path):
    pair(tmp_path, "a", size=(8, 12))
    with_orientation(tmp_path / "rgb" / "a.png", np.zeros((8, 12, 3), np.uint8), 6)
    words = error_of(open_pairs(tmp_path)[0].__getitem__, 0)
    assert "is 8x12 and" in words
    assert "the photo is turned as its EXIF orientation says, which swaps width and height" in words


# --- NYU Depth V2 ---


def mat(file, count=4, **changed):
    contents = {
        "images": RANDOM.integers(0, 256, (count, 3, 6, 4), dtype=np.uint8),
        "depths": RANDOM.uniform(1, 9, (count, 6, 4)).astype(np.float32),
    }
    contents |= changed
    with h5py.File(file, "w") as opened:
        for name, values in contents.items():
            if values is not None:
                opened[name] = values
    return contents


def test_nyu_is_transposed_as_matlab_stores_it(tmp_path):
    written = mat(tmp_path / "nyu.mat")
    training, test = open_pairs(tmp_path / "nyu.mat")
    assert (len(training), len(test)) == (2, 2)
    image, depth = test[0]
    np.testing.assert_array_equal(image.numpy(), written["images"][2].transpose(0, 2, 1))
    np.testing.assert_array_equal(depth[0].numpy(), written["depths"][2].T)
    assert test.names == ["0003", "0004"]
    assert test.unit == Unit("m")


def test_nyu_is_divided_as_published():
    training, test = nyu.split(1449)
    assert (training, test) == (range(1000), range(1000, 1449))
    with pytest.raises(UsageError):
        nyu.split(1)


def test_files_that_are_not_nyu(tmp_path, monkeypatch):
    file = tmp_path / "a.mat"
    assert "no such file" in error_of(open_pairs, file)
    file.write_bytes(b"MATLAB 5.0")
    assert "HDF5" in error_of(open_pairs, file)
    mat(file, depths=None)
    assert "no depths" in error_of(open_pairs, file)
    mat(file, depths=np.ones((4, 9, 9), np.float32))
    assert "belong together" in error_of(open_pairs, file)
    mat(file, images=np.ones((4, 3, 6, 4), np.float32))
    assert "uint8" in error_of(open_pairs, file)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert "ddf-convert[depth]" in error_of(open_pairs, file)


@pytest.mark.parametrize(
    ("images", "depths", "words"),
    [
        ((10**6, 3, 640, 480), (10**6, 640, 480), "which are not there"),
        ((2, 3, 10**5, 10**5), (2, 10**5, 10**5), "and up to"),
        (None, (2, 4, 4), "not both arrays"),
    ],
)
def test_hdf5_that_claims_too_much(tmp_path, images, depths, words):
    with h5py.File(tmp_path / "a.mat", "w") as file:
        if images is None:
            file.create_group("images")
        else:
            file.create_dataset("images", images, np.uint8, chunks=True)
        file.create_dataset("depths", depths, np.float32, chunks=True)
    assert words in error_of(nyu.open_file, tmp_path / "a.mat")
