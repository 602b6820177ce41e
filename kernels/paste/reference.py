"""Cover and paint in plain NumPy: whole boolean arrays, overwritten one after the other."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dop_fast.types import Array, Segments


def cover(segments: Segments, queue: Array, sigma: float, count: int) -> NDArray[np.int64]:
    """Return after which row of `queue` each of `count` canvases ends, int64[<= count].

    `queue` int64[t s] indexes `segments`. A canvas takes row after row until the union of its
    segments covers a share of at least `sigma`, or all that the queue could ever cover; the next
    canvas goes on with the next row. There are fewer than `count` where the queue is too short.
    """
    masks = {index: _whole(segments, index) for index in np.unique(queue)}
    most = np.any(list(masks.values()), axis=0).sum()
    covered = np.zeros(segments.canvas, np.bool_)
    ends: list[int] = []
    for end, row in enumerate(queue, 1):
        if len(ends) == count:
            break
        for index in row:
            covered |= masks[index]
        if covered.mean() >= sigma or covered.sum() == most:
            ends.append(end)
            covered = np.zeros(segments.canvas, np.bool_)
    return np.array(ends, np.int64)


def paint(
    segments: Segments, sources: Array, placements: Array, starts: Array, fill: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paste segments at their own place; the later one is on top.

    `segments.image` indexes `sources` uint8[k h w 3]. Canvas i gets the segments
    `placements[starts[i]:starts[i+1]]`, `placements` int64[l], `starts` int64[n+1]. Returns the
    pixels uint8[n h w 3], `fill` where no segment is, and where one is, bool[n h w].
    """
    pixels = np.full((len(starts) - 1, *segments.canvas, 3), fill, np.uint8)
    valid = np.zeros(pixels.shape[:3], np.bool_)
    for canvas, painted, start, end in zip(pixels, valid, starts[:-1], starts[1:], strict=True):
        for index in placements[start:end]:
            mask = _whole(segments, index)
            canvas[mask] = sources[segments.image[index]][mask]
            painted |= mask
    return pixels, valid


def visible(segments: Segments, placements: Array, starts: Array) -> NDArray[np.int64]:
    """Return how many pixels of each placement are seen, int64[l], painted as by `paint`."""
    seen = np.zeros(len(placements), np.int64)
    for start, end in pairwise(starts):
        covered = np.zeros(segments.canvas, np.bool_)
        for at in range(end - 1, start - 1, -1):
            mask = _whole(segments, placements[at])
            seen[at] = np.count_nonzero(mask & ~covered)
            covered |= mask
    return seen


def _whole(segments: Segments, index: int) -> NDArray[np.bool_]:
    top, left, bottom, right = segments.box[index]
    mask = np.zeros(segments.canvas, np.bool_)
    mask[top:bottom, left:right] = segments.mask(index)
    return mask
