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
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the segments at `index` int[k] as a network sees them, [k 3 size size].

    `segments.image` indexes `sources` uint8[n h w 3]; the result is channels-last, float32 or
    bfloat16, on their device. Each tight box, the fill outside the mask, is stretched to the whole
    input as `reference.compose` does it.
    """
    if sources.shape[1:] != (*segments.canvas, 3) or sources.dtype != torch.uint8:
        raise ValueError(f"sources {sources.dtype}{list(sources.shape)} for {segments.canvas}")
    chosen = segments.select(index)
    _check(chosen, len(sources))
    everything = np.arange(len(chosen))
    if sources.is_cuda:
        from dop_fast.kernels.compose import gpu

        made = gpu.compose(sources, chosen, everything, entry, dtype)
    else:
        made = cpu.compose(sources.contiguous(), chosen, everything, entry, dtype)
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
