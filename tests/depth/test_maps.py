"""Photos and depth maps as files."""

import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support.depth_scenes import error_of, photo, with_orientation, write_map
from timm.data import ImageDataset

from ddf_convert.depth import maps, pfm
from ddf_convert.depth.maps import Unit, encode_depth, read_depth, read_photo
from ddf_convert.training.dataset import open_images
from ddf_convert.visualize import photos


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
    assert "whole numbers" in error_of(encode_depth, torch.full((1, 2, 2), 1.5), file, Unit("px"), whole=False)
    assert "up to 65535" in error_of(encode_depth, torch.full((1, 2, 2), 70.0), file, Unit("m"), whole=False)
    assert ".png, .npy, .pfm" in error_of(encode_depth, torch.ones(1, 2, 2), tmp_path / "a.jpg", Unit("m"), whole=True)


def test_holes_are_zero_however_they_are_written(tmp_path):
    file = write_map(tmp_path / "a.npy", np.array([[0.0, -1.0, np.nan, np.inf, 2.0]]))
    assert read_depth(file).tolist() == [[[0.0, 0.0, 0.0, 0.0, 2.0]]]
    assert "every pixel is a hole" in error_of(read_depth, write_map(tmp_path / "b.npy", np.zeros((2, 2))))


def test_eight_bits_are_refused_with_advice(tmp_path):
    file = write_map(tmp_path / "a.png", np.full((2, 2), 9, np.uint8))
    assert "256 depths" in error_of(read_depth, file)
    assert read_depth(file, allow_8bit=True).tolist() == [[[9.0, 9.0], [9.0, 9.0]]]
    assert "in color" in error_of(read_depth, write_map(tmp_path / "b.png", photo()))


def test_files_that_cannot_be_read(tmp_path):
    for name, content in (("a.png", b"nothing"), ("a.npy", b"nothing"), ("a.pfm", b"Pf\n2 2\n-1\nshort")):
        (tmp_path / name).write_bytes(content)
        error_of(read_depth, tmp_path / name)
        error_of(read_depth, tmp_path / f"missing-{name}")
    error_of(read_photo, tmp_path / "a.png")
    cut = write_map(tmp_path / "cut.png", photo(64, 64))
    cut.write_bytes(cut.read_bytes()[:500])
    assert "cannot be read" in error_of(read_photo, cut)
    assert "shape (H, W)" in error_of(read_depth, write_map(tmp_path / "c.npy", np.ones((2, 3, 4))))
    assert "Object arrays" in error_of(read_depth, write_map(tmp_path / "d.npy", np.array([[None]])))
    assert "is read from" in error_of(read_depth, tmp_path / "a.txt")


def test_pfm_in_either_order_of_bytes():
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    big = b"Pf\n2 2\n1.0\n" + values[::-1].astype(">f4").tobytes()
    for content in (pfm.encode(values), big):
        np.testing.assert_array_equal(pfm.decode(content), values)
    with pytest.raises(ValueError, match="three channels"):
        pfm.decode(b"PF\n1 1\n-1.0\n" + bytes(12))


def test_grey_photos_get_three_channels(tmp_path):
    found = read_photo(write_map(tmp_path / "a.png", np.full((2, 3), 7, np.uint8)))
    assert found.tolist() == torch.full((3, 2, 3), 7).tolist()


# --- EXIF orientation ---


@pytest.mark.parametrize(
    ("orientation", "suffix"), [*((number, ".jpg") for number in range(1, 9)), (6, ".png"), (6, ".webp")]
)
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
    "npy that wraps to 0": ("a.npy", npy((2**32, 2**32)), "it is incomplete"),
    "npy, one short": ("a.npy", npy((2, 2), data=b"\0" * 15), "it is incomplete"),
    "npy of negative sizes": ("a.npy", npy((-3, 4), data=b"\0" * 99), "cannot be read"),
    "npy of long text": ("a.npy", npy((1, 1), dtype=f"<U{2**28}"), "cannot be read|it is incomplete"),
    "npy whose header is no shape": ("a.npy", npy("x"), "cannot be read"),
    "npy of a later version": ("a.npy", npy((1, 1), version=3), "version 3.0"),
    "npy of nested brackets": ("a.npy", npy("(" * 5000), "cannot be read"),
    "pfm of 10^18": ("a.pfm", b"Pf\n1000000000 1000000000\n-1.0\nxxxx", "it should hold"),
    "pfm of many digits": ("a.pfm", b"Pf\n" + b"9" * 5000 + b" 1\n-1.0\nxxxx", "cannot be read"),
    "png of a gigabyte": ("a.png", png(2**15, 2**15), "cannot be read: .*exceeds limit"),
    "a program in PostScript": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_files_that_claim_too_much(tmp_path, name):
    file, content, words = CLAIMS[name]
    (tmp_path / file).write_bytes(content)
    tracemalloc.start()
    try:
        message = error_of(read_depth, tmp_path / file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert re.search(words, message)
    assert len(message) < 1000


def test_a_sparse_file_is_not_read(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(npy((2**20, 2**20)))
        file.truncate(2**43)
    assert "a depth map has up to" in error_of(read_depth, tmp_path / "a.npy")
