"""Photos and depth maps as files, pairs of them, NYU Depth V2's file, and small maps made of large ones."""

import re
import struct
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from timm.data import ImageDataset

from ddf_convert.depth import maps, nyu, pfm
from ddf_convert.depth.crops import Crops
from ddf_convert.depth.lowres import DOWNSAMPLINGS, cut_to_factor, downsample, fit
from ddf_convert.depth.maps import Unit, encode_depth, read_depth, read_photo
from ddf_convert.depth.metrics import errors, mean_rmse
from ddf_convert.depth.pairs import each, open_pairs
from ddf_convert.errors import UsageError
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training.dataset import open_images
from ddf_convert.visualize import photos

RANDOM = np.random.default_rng(0)


def photo(height=8, width=12):
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(file, values):
    """A photo or a depth map, as the suffix and the dtype say."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, values)
    elif file.suffix == ".pfm":
        file.write_bytes(pfm.encode(values.astype(np.float32)))
    else:
        Image.fromarray(values).save(file)
    return file


def pair(folder, name, suffix=".png", size=(8, 12)):
    write(folder / "rgb" / f"{name}.png", photo(*size))
    depth = RANDOM.integers(500, 5000, size, dtype=np.uint16)
    return write(folder / "depth" / f"{name}{suffix}", depth if suffix == ".png" else depth / 1000)


def said(call, *arguments, **options):
    """What a user is told, which is one line."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- files ---


@pytest.mark.parametrize("suffix", maps.DEPTHS)
def test_depth_goes_out_and_comes_back(tmp_path, suffix):
    depth = torch.tensor([[[1.0, 2.0, 70.0], [3.0, 4.0, 5000.0]]])
    file = tmp_path / f"a{suffix}"
    content, unit = encode_depth(depth, file, Unit("mm"), whole=True)
    file.write_bytes(content)
    assert unit == Unit("mm")
    assert torch.equal(read_depth(file), depth)


def test_metres_become_millimetres_in_png(tmp_path):
    content, unit = encode_depth(torch.tensor([[[1.2344, 2.0]]]), tmp_path / "a.png", Unit("m"), whole=False)
    (tmp_path / "a.png").write_bytes(content)
    assert unit == Unit("mm")
    assert read_depth(tmp_path / "a.png").tolist() == [[[1234.0, 2000.0]]]


def test_png_refuses_what_it_cannot_hold(tmp_path):
    file = tmp_path / "a.png"
    assert "whole numbers" in said(encode_depth, torch.full((1, 2, 2), 1.5), file, Unit("px"), whole=False)
    assert "up to 65535" in said(encode_depth, torch.full((1, 2, 2), 70.0), file, Unit("m"), whole=False)
    assert ".png, .npy, .pfm" in said(encode_depth, torch.ones(1, 2, 2), tmp_path / "a.jpg", Unit("m"), whole=True)


def test_holes_are_zero_however_they_are_written(tmp_path):
    file = write(tmp_path / "a.npy", np.array([[0.0, -1.0, np.nan, np.inf, 2.0]]))
    assert read_depth(file).tolist() == [[[0.0, 0.0, 0.0, 0.0, 2.0]]]
    assert "every pixel is a hole" in said(read_depth, write(tmp_path / "b.npy", np.zeros((2, 2))))


def test_eight_bits_are_refused_with_advice(tmp_path):
    file = write(tmp_path / "a.png", np.full((2, 2), 9, np.uint8))
    assert "256 depths" in said(read_depth, file)
    assert read_depth(file, allow_8bit=True).tolist() == [[[9.0, 9.0], [9.0, 9.0]]]
    assert "in color" in said(read_depth, write(tmp_path / "b.png", photo()))


def test_files_that_cannot_be_read(tmp_path):
    for name, content in (("a.png", b"nothing"), ("a.npy", b"nothing"), ("a.pfm", b"Pf\n2 2\n-1\nshort")):
        (tmp_path / name).write_bytes(content)
        said(read_depth, tmp_path / name)
        said(read_depth, tmp_path / f"missing-{name}")
    said(read_photo, tmp_path / "a.png")
    cut = write(tmp_path / "cut.png", photo(64, 64))
    cut.write_bytes(cut.read_bytes()[:500])
    assert "cannot be read" in said(read_photo, cut)
    assert "shape (H, W)" in said(read_depth, write(tmp_path / "c.npy", np.ones((2, 3, 4))))
    assert "Object arrays" in said(read_depth, write(tmp_path / "d.npy", np.array([[None]])))
    assert "is read from" in said(read_depth, tmp_path / "a.txt")


def test_pfm_in_either_order_of_bytes():
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    big = b"Pf\n2 2\n1.0\n" + values[::-1].astype(">f4").tobytes()
    for content in (pfm.encode(values), big):
        np.testing.assert_array_equal(pfm.decode(content), values)
    with pytest.raises(ValueError, match="three channels"):
        pfm.decode(b"PF\n1 1\n-1.0\n" + bytes(12))


def test_grey_photos_get_three_channels(tmp_path):
    found = read_photo(write(tmp_path / "a.png", np.full((2, 3), 7, np.uint8)))
    assert found.tolist() == torch.full((3, 2, 3), 7).tolist()


# --- pairs ---


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
    assert "nothing there" in said(open_pairs, tmp_path / "missing")
    assert "rgb is missing" in said(open_pairs, tmp_path)
    (tmp_path / "rgb").mkdir()
    assert "has no files" in said(open_pairs, tmp_path)
    pair(tmp_path, "a")
    write(tmp_path / "rgb" / "b.jpg", photo())
    assert "b.jpg has no partner" in said(open_pairs, tmp_path)
    write(tmp_path / "depth" / "b.npy", np.ones((8, 12)))
    assert "--unit" in said(open_pairs, tmp_path)
    assert len(open_pairs(tmp_path, unit="mm")[0]) == 1
    write(tmp_path / "rgb" / "b.png", photo())
    assert "same name" in said(open_pairs, tmp_path, unit="mm")


def test_a_pair_of_two_sizes(tmp_path):
    pair(tmp_path, "a")
    write(tmp_path / "depth" / "a.png", np.full((4, 6), 9, np.uint16))
    assert "12x8" in said(open_pairs(tmp_path)[0].__getitem__, 0)


# --- NYU Depth V2 ---


def with_orientation(file, values, orientation):
    """A photo as a camera stores it: its pixels as they lie on the sensor, and how it was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values).save(file, exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_orientation_says(orientation, suffix, tmp_path):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # white where it is near the upper left corner
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 1)[:, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    with_orientation(tmp_path / f"photo{suffix}", np.ascontiguousarray(stored), orientation)
    for read in (read_photo, lambda file: torch.from_numpy(np.array(photos.read_photo(file))).permute(2, 0, 1)):
        found = read(tmp_path / f"photo{suffix}")
        assert found.shape == (3, 8, 16)
        assert ((found > 127) == torch.from_numpy(upright > 127).permute(2, 0, 1)).all()


def test_images_to_train_with_stay_as_timm_reads_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with_orientation(tmp_path / name / "photo.png", np.zeros((8, 16, 3), np.uint8), 6)
    ours, timms = (
        open_images(str(tmp_path), "validation", True, undivided=True)[0][0],
        ImageDataset(str(tmp_path))[0][0],
    )
    assert ours.size == timms.size == (16, 8)


def test_a_damaged_block_of_exif_turns_nothing(tmp_path):
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_photo(tmp_path / "photo.jpg").shape == (3, 8, 16)


def test_a_photo_that_fits_no_more_once_it_is_turned(tmp_path):
    pair(tmp_path, "a", size=(8, 12))
    with_orientation(tmp_path / "rgb" / "a.png", np.zeros((8, 12, 3), np.uint8), 6)
    words = said(open_pairs(tmp_path)[0].__getitem__, 0)
    assert "is 8x12 and" in words
    assert "the photo is turned as its EXIF orientation says, which swaps width and height" in words


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
    assert "no such file" in said(open_pairs, file)
    file.write_bytes(b"MATLAB 5.0")
    assert "HDF5" in said(open_pairs, file)
    mat(file, depths=None)
    assert "no depths" in said(open_pairs, file)
    mat(file, depths=np.ones((4, 9, 9), np.float32))
    assert "belong together" in said(open_pairs, file)
    mat(file, images=np.ones((4, 3, 6, 4), np.float32))
    assert "uint8" in said(open_pairs, file)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert "ddf-convert[depth]" in said(open_pairs, file)


# --- small maps ---


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
    assert "that of a factor of 8" in said(fit, image, torch.ones(1, 4, 8), 4)
    assert "the same view" in said(fit, image, torch.ones(1, 8, 8), 8)


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


# --- files that claim to be more than they are ---


def npy(shape, dtype="<f4", data=b"", version=1):
    """An NPY file with any header."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + len(text).to_bytes(2 if version == 1 else 4, "little")
        + text.encode()
        + data
    )


TEN_BYTES = struct.pack(">I", 10) + b"IDAT" + b"x" * 14


def png(width, height):
    """The beginning of a PNG of 16 bits: a header and hardly a pixel."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + TEN_BYTES


CLAIMS = {
    "npy of 10^18": ("a.npy", npy((10**9, 10**9)), "it is incomplete"),
    "npy of 10^40": ("a.npy", npy((10**20, 10**20)), "it is incomplete"),
    "npy that wraps to 0": ("a.npy", npy((2**32, 2**32)), "it is incomplete"),
    "npy, one short": ("a.npy", npy((2, 2), data=b"\0" * 15), "it is incomplete"),
    "npy of negative sizes": ("a.npy", npy((-3, 4), data=b"\0" * 99), "cannot be read"),
    "npy of long text": ("a.npy", npy((1, 1), dtype=f"<U{2**28}"), "cannot be read|it is incomplete"),
    "npy of objects": ("a.npy", npy((1, 1), dtype="|O", data=b"\0" * 99), "cannot be read"),
    "npy whose header is no shape": ("a.npy", npy("x"), "cannot be read"),
    "npy of a later version": ("a.npy", npy((1, 1), version=3), "version 3.0"),
    "npy cut off": ("a.npy", b"\x93NUMPY\x01", "cannot be read"),
    "npy of nested brackets": ("a.npy", npy("(" * 5000), "cannot be read"),
    "pfm of 10^18": ("a.pfm", b"Pf\n1000000000 1000000000\n-1.0\nxxxx", "it should hold"),
    "pfm of many digits": ("a.pfm", b"Pf\n" + b"9" * 5000 + b" 1\n-1.0\nxxxx", "cannot be read"),
    "png of 10^18": ("a.png", png(10**9, 10**9), "cannot be read"),
    "png of a gigabyte": ("a.png", png(2**15, 2**15), "cannot be read: .*exceeds limit"),
    "a program in PostScript": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_files_that_claim_too_much(tmp_path, name):
    file, content, words = CLAIMS[name]
    (tmp_path / file).write_bytes(content)
    tracemalloc.start()
    try:
        message = said(read_depth, tmp_path / file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert re.search(words, message)
    assert len(message) < 1000


def test_a_sparse_file_is_not_read(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy((2**20, 2**20)))
        file.truncate(2**43)
    assert "a depth map has up to" in said(read_depth, tmp_path / "a.npy")


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
    assert words in said(nyu.open_file, tmp_path / "a.mat")
