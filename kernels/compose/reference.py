"""Segments as a network sees them, in plain PIL and NumPy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dop_fast.types import Array, Segments


@dataclass(frozen=True)
class Entry:
    """How segments enter a network, as `size` x `size` pixels.

    `fill` is the grey around a segment; `mean` and `std` are those of R, G, B in [0, 1].
    """

    size: int
    fill: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def stretch(sources: Array, segments: Segments, index: Array, entry: Entry) -> NDArray[np.uint8]:
    """Return the segments at `index` int[k] before they are normalised, uint8[k size size 3].

    `segments.image` indexes `sources` uint8[n h w 3]. Each tight box, `fill` where it is not the
    segment, is resized to the whole input, bicubic and antialiased, as ACE does: across first,
    then down. Pillow 13 by itself turns the order round where a tall image shrinks.
    """
    pixels = np.empty((len(index), entry.size, entry.size, 3), np.uint8)
    for view, i in zip(pixels, index, strict=True):
        top, left, bottom, right = segments.box[i]
        crop = sources[segments.image[i], top:bottom, left:right].copy()
        crop[~segments.mask(i)] = entry.fill
        across = Image.fromarray(crop).resize((entry.size, len(crop)), Image.Resampling.BICUBIC)
        view[:] = np.asarray(across.resize((entry.size, entry.size), Image.Resampling.BICUBIC))
    return pixels


def compose(sources: Array, segments: Segments, index: Array, entry: Entry) -> NDArray[np.float32]:
    """Return what `stretch` does as (pixels / 255 - mean) / std, float32[k size size 3]."""
    pixels = stretch(sources, segments, index, entry).astype(np.float32)
    mean, std = np.array([entry.mean, entry.std], np.float32)
    normalised: NDArray[np.float32] = (pixels / np.float32(255) - mean) / std
    return normalised
