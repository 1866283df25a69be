"""Reads and writes PFM, the float32 format of stereo benchmarks.

Source: the format's description by Paul Debevec, http://www.pauldebevec.com/Research/HDR/PFM/
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_HEADER = re.compile(rb"^(P[Ff])\s+(\d+)\s+(\d+)\s+(-?[\d.]+(?:[eE][+-]?\d+)?)[ \t\r]*\n")


def decode(content: bytes) -> NDArray[np.float32]:
    """Decodes a file's content as an image of one channel, (H, W) float32, the top row first."""
    found = _HEADER.match(content)
    if found is None:
        raise ValueError("it is not a PFM file")
    if found[1] == b"PF":
        raise ValueError("it has three channels, and a depth map has one")
    width, height, scale = int(found[2]), int(found[3]), float(found[4])
    pixels = content[found.end() :]
    if len(pixels) != 4 * width * height or not pixels:
        raise ValueError(f"it should hold {width} x {height} numbers, and is {len(pixels)} bytes long")
    # The sign of the scale is the order of bytes; rows are stored from the bottom.
    values = np.frombuffer(pixels, "<f4" if scale < 0 else ">f4").reshape(height, width)
    return np.ascontiguousarray(values[::-1]).astype(np.float32)


def encode(image: NDArray[np.float32]) -> bytes:
    """Encodes an image of one channel, (H, W), the top row first."""
    height, width = image.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode() + np.ascontiguousarray(image[::-1], "<f4").tobytes()
