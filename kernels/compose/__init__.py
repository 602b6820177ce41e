"""Segments to batches of a network's input, without an image of any of them being kept."""

import numpy as np
import torch
from torch import Tensor

from dop_fast.kernels.compose import cpu, reference
from dop_fast.kernels.compose.reference import Entry
from dop_fast.types import Array, Segments

__all__ = ["Entry", "compose", "reference"]


def compose(
    sources: Tensor,
    segments: Segments,
    index: Array,
    entry: Entry,
    out: Tensor,
) -> Tensor:
    """Return the segments at `index` int[k] as a network sees them, [k 3 size size].

    `segments.image` indexes `sources` uint8[n h w 3]. Each tight box, the fill outside the mask,
    is stretched to the whole input as `reference.compose` does it. The result is channels-last, a
    view of `out` [b size size 3], b >= k, which is float32 or bfloat16, on the device of
    `sources`, and best used again: fresh memory takes as long as half of the work.
    """
    if sources.shape[1:] != (*segments.canvas, 3) or sources.dtype != torch.uint8:
        raise ValueError(f"sources {sources.dtype}{list(sources.shape)} for {segments.canvas}")
    if len(out) < len(index) or out.shape[1:] != (entry.size, entry.size, 3):
        raise ValueError(f"{list(out.shape)} for {len(index)} segments of {entry.size} pixels")
    if not out.is_contiguous() or out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"contiguous float32 or bfloat16 is needed, not {out.dtype}")
    chosen = segments.select(index)
    _check(chosen, len(sources))
    made = out[: len(chosen)]
    if sources.is_cuda:
        from dop_fast.kernels.compose import gpu

        gpu.compose(sources.contiguous(), chosen, entry, made)
    else:
        cpu.compose(sources.contiguous(), chosen, entry, made)
    return made.permute(0, 3, 1, 2)


def _check(segments: Segments, sources: int) -> None:
    """Refuse what would make compiled code leave its arrays."""
    top, left, bottom, right = segments.box.T
    height, width = segments.canvas
    inside = (top >= 0) & (left >= 0) & (bottom <= height) & (right <= width)
    inside &= (top < bottom) & (left < right)
    inside &= (segments.image >= 0) & (segments.image < sources)
    if not inside.all():
        raise ValueError(f"segments that do not fit {sources} images of {segments.canvas}")
    if np.any(8 * np.diff(segments.offset) < (bottom - top) * (right - left)):
        raise ValueError("segments with less bits than pixels")
