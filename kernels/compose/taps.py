"""Pillow's bicubic filter as tables: which pixels make an output pixel, and with what weights."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GROUP = 4
"""Taps come in whole groups of as many as the filter has where it does not shrink."""
POINT = 22
"""Bits of a weight after the point: in whole numbers sums do not depend on their order."""


@lru_cache(maxsize=4)
def tables(longest: int, size: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the taps that resize any line of up to `longest` pixels to `size`.

    `first` int32[longest+1 size] and `weights` int32[longest+1 size taps]: a line of l pixels
    becomes sum_k weights[l, x, k] line[min(first[l, x] + k, l - 1)] / 2^POINT.
    """
    most = 2 * int(np.ceil(2 * max(1.0, longest / size)))
    taps = -(-most // GROUP) * GROUP
    length = np.arange(longest + 1)[:, None]
    scale = length / size
    shrink = np.maximum(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 2 * shrink + 0.5).astype(np.int32), 0)
    end = np.minimum((centre + 2 * shrink + 0.5).astype(np.int32), length)
    place = first[..., None] + np.arange(taps)
    weights = _bicubic((place - centre[..., None] + 0.5) / shrink[..., None])
    weights[place >= end[..., None]] = 0
    weights[1:] /= weights[1:].sum(axis=2, keepdims=True)
    fixed = np.trunc(weights * 2**POINT + np.copysign(0.5, weights))
    return first.astype(np.int32), fixed.astype(np.int32)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def colours(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Return scale and shift float32[2 3]: pixel * scale + shift is (pixel / 255 - mean) / std."""
    scale = 1 / np.array(std)
    return np.array([scale / 255, -np.array(mean) * scale], np.float32)
