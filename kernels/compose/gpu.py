"""Compose in Triton: `reference.py` with a block of output pixels in each program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.compose.reference import Entry
from dop_fast.kernels.compose.taps import POINT, colours, tables
from dop_fast.types import Segments

BLOCK = 256


def compose(sources: Tensor, segments: Segments, entry: Entry, out: Tensor) -> None:
    """Fill `out` [m size size 3] with what `reference.compose` makes of all segments."""
    size, (height, width) = entry.size, segments.canvas
    first, weights = tables(max(height, width), size)
    arrays = (
        segments.box, segments.image, segments.offset, segments.bits, first, weights,
        colours(entry.mean, entry.std),
    )  # fmt: skip
    if not len(segments):
        return
    grid = (len(segments), triton.cdiv(size * size, BLOCK))
    _compose[grid](
        sources, *(torch.from_numpy(x).to(sources.device) for x in arrays), out,
        entry.fill, size, height, width, weights.shape[2], POINT, BLOCK,
    )  # fmt: skip


@triton.jit
def _whole(total, POINT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round and clip a sum to a pixel's value, as Pillow does after each of its two passes."""
    return tl.minimum(tl.maximum((total + (1 << (POINT - 1))) >> POINT, 0), 255)


@triton.jit
def _compose(  # type: ignore[no-untyped-def]
    sources, boxes, image, offset, bits, first, weights, colours, out, fill, size, height, width,
    TAPS: tl.constexpr, POINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = pixel < size * size
    top, left = tl.load(boxes + 4 * segment), tl.load(boxes + 4 * segment + 1)
    tall = tl.load(boxes + 4 * segment + 2) - top
    wide = tl.load(boxes + 4 * segment + 3) - left
    corner = (tl.load(image + segment).to(tl.int64) * height + top) * width + left
    mask = bits + tl.load(offset + segment)
    down, along = tall * size + pixel // size, wide * size + pixel % size
    first_row = tl.load(first + down, mask=exists, other=0)
    first_column = tl.load(first + along, mask=exists, other=0)
    red = tl.zeros((BLOCK,), tl.int32)
    green = tl.zeros((BLOCK,), tl.int32)
    blue = tl.zeros((BLOCK,), tl.int32)
    for i in range(TAPS):
        y = tl.minimum(first_row + i, tall - 1)
        red_across = tl.zeros((BLOCK,), tl.int32)
        green_across = tl.zeros((BLOCK,), tl.int32)
        blue_across = tl.zeros((BLOCK,), tl.int32)
        for j in range(TAPS):
            x = tl.minimum(first_column + j, wide - 1)
            at = y * wide + x
            inside = ((tl.load(mask + (at >> 3), mask=exists, other=0) << (at & 7)) & 128) != 0
            source = sources + 3 * (corner + y * width + x)
            weight = tl.load(weights + along * TAPS + j, mask=exists, other=0)
            red_across += weight * tl.load(source, mask=exists & inside, other=fill)
            green_across += weight * tl.load(source + 1, mask=exists & inside, other=fill)
            blue_across += weight * tl.load(source + 2, mask=exists & inside, other=fill)
        weight = tl.load(weights + down * TAPS + i, mask=exists, other=0)
        red += weight * _whole(red_across, POINT)
        green += weight * _whole(green_across, POINT)
        blue += weight * _whole(blue_across, POINT)
    target = out + 3 * (segment.to(tl.int64) * size * size + pixel)
    red = _whole(red, POINT) * tl.load(colours) + tl.load(colours + 3)
    green = _whole(green, POINT) * tl.load(colours + 1) + tl.load(colours + 4)
    blue = _whole(blue, POINT) * tl.load(colours + 2) + tl.load(colours + 5)
    tl.store(target, red.to(out.dtype.element_ty), mask=exists)
    tl.store(target + 1, green.to(out.dtype.element_ty), mask=exists)
    tl.store(target + 2, blue.to(out.dtype.element_ty), mask=exists)
