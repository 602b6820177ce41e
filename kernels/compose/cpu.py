"""Compose in Numba: `reference.py` without an intermediate image, rows as vectors.

The crop is turned by 90 degrees first, so that resizing across takes whole columns at a time, as
resizing down then takes whole rows.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dop_fast.kernels.compose.reference import Entry
from dop_fast.kernels.compose.taps import POINT, colours, tables
from dop_fast.types import Array, Segments

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")
HALF, SHIFT = np.int32(1 << (POINT - 1)), np.int32(POINT)


def compose(sources: Tensor, segments: Segments, entry: Entry, out: Tensor) -> None:
    """Fill `out` [m size size 3] with what `reference.compose` makes of all segments."""
    count = len(segments)
    bits = out if out.dtype == torch.float32 else out.view(torch.uint16)
    rows = bits.view(count, entry.size, entry.size * 3).numpy()
    first, weights = tables(max(segments.canvas), entry.size)
    settings = (
        first,
        weights,
        colours(entry.mean, entry.std),
        np.int32(entry.fill),
    )
    masks = (segments.box, segments.image, segments.offset, segments.bits)
    pixels = sources.numpy()
    parts = max(1, min(torch.get_num_threads(), count))
    edges = [count * k // parts for k in range(parts + 1)]
    if parts == 1:
        _span(pixels, masks, 0, *settings, rows)
        return
    with ThreadPoolExecutor(parts) as pool:
        list(
            pool.map(
                lambda e: _span(pixels, masks, e[0], *settings, rows[slice(*e)]), pairwise(edges)
            )
        )


@_compiled
def _span(
    sources: Array,
    masks: tuple[Array, Array, Array, Array],
    start: int,
    first: Array,
    weights: Array,
    colours: Array,
    fill: int,
    out: Array,
) -> None:
    """Compose the segments from `start` on with one set of buffers."""
    box, image, offset, bits = masks
    size = out.shape[1]
    tallest, widest = 1, 1
    for i in range(start, start + len(out)):
        tallest = max(tallest, box[i, 2] - box[i, 0])
        widest = max(widest, box[i, 3] - box[i, 1])
    turned = np.empty((widest, 3 * tallest), np.int32)
    column, row = np.empty(3 * tallest, np.int32), np.empty(3 * size, np.int32)
    across = np.empty((tallest, 3 * size), np.int32)
    line = np.empty(3 * size, np.float32)
    scale, shift = np.empty(3 * size, np.float32), np.empty(3 * size, np.float32)
    for k in range(3 * size):
        scale[k], shift[k] = colours[0, k % 3], colours[1, k % 3]
    for k in range(len(out)):
        i = start + k
        height, width = box[i, 2] - box[i, 0], box[i, 3] - box[i, 1]
        _turn(sources[image[i]], box[i], bits[offset[i] :], fill, turned)
        for x in range(size):
            _blend(turned, 3 * height, first, weights, (width, x), column)
            _stand(column, height, across, 3 * x)
        for y in range(size):
            _blend(across, 3 * size, first, weights, (height, y), row)
            _finish(row, scale, shift, line, out, k, y)


@_compiled
def _turn(source: Array, box: Array, bits: Array, fill: int, turned: Array) -> None:
    """Fill `turned`[x, c * height + y] with the crop, `fill` outside the mask."""
    top, left, bottom, right = box
    height = bottom - top
    at = np.uint64(0)
    for y in range(height):
        pixels = source[top + y, left:right]
        for x in range(right - left):
            inside = (bits[at >> np.uint64(3)] << (at & np.uint64(7))) & np.uint64(128)
            for c in range(3):
                turned[x, c * height + y] = pixels[x, c] if inside else fill
            at += np.uint64(1)


@_compiled
def _blend(
    lines: Array, many: int, first: Array, weights: Array, at: tuple[int, int], into: Array
) -> None:
    """Sum the weighted lines that make the output pixel `at` = (number of lines, place)."""
    count, place = at
    for k in range(0, weights.shape[2], 4):
        a, b = weights[count, place, k], weights[count, place, k + 1]
        c, d = weights[count, place, k + 2], weights[count, place, k + 3]
        start, last = first[at] + k, count - 1
        one, two = np.uint64(min(start, last)), np.uint64(min(start + 1, last))
        three, four = np.uint64(min(start + 2, last)), np.uint64(min(start + 3, last))
        for i in range(many):
            total = a * lines[one, i] + b * lines[two, i] + c * lines[three, i] + d * lines[four, i]
            into[i] = total if k == 0 else into[i] + total


@_compiled
def _whole(total: Any) -> Any:
    """Round and clip a sum to a pixel's value, as Pillow does after each of its two passes."""
    value = np.int32(np.int32(total + HALF) >> SHIFT)  # Numba's sums are of 64 bits
    return np.int32(min(max(value, np.int32(0)), np.int32(255)))


@_compiled
def _stand(column: Array, height: int, across: Array, at: int) -> None:
    """Write a column of pixels into rows."""
    for i in range(3 * height):
        column[i] = _whole(column[i])
    for y in range(height):
        for c in range(3):
            across[y, at + c] = column[c * height + y]


@_compiled
def _finish(
    row: Array, scale: Array, shift: Array, line: Array, out: Array, k: int, y: int
) -> None:
    """Normalise a row and write it as float32, or the bits of its bfloat16."""
    if out.itemsize == 4:
        for i in range(len(row)):
            out[k, y, i] = np.float32(_whole(row[i])) * scale[i] + shift[i]
        return
    for i in range(len(row)):
        line[i] = np.float32(_whole(row[i])) * scale[i] + shift[i]
    bits = line.view(np.uint32)
    for i in range(len(row)):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        out[k, y, i] = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
