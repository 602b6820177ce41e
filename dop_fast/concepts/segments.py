"""Images to segments: SLIC at several resolutions, without specks and repetitions."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from dop_fast.config import SMALL_SIDE, ExtractConfig
from dop_fast.kernels.slic import slic
from dop_fast.types import Array, Segments

LARGE, SMALL = (15, 50, 80), (5, 10, 15)
"""Resolutions as published, for photographs and for images of up to `SMALL_SIDE` pixels."""


def segment(images: Array, config: ExtractConfig) -> Segments:
    """Cut `images` uint8[n h w 3] into segments; `Segments.image` is the position in `images`."""
    return collect(label_maps(images, config), resolutions(images, config), config)


def label_maps(images: Array, config: ExtractConfig) -> NDArray[np.int32]:
    """Return SLIC's labels at each resolution, int32[n r h w]."""
    return slic(
        images,
        resolutions(images, config),
        compactness=config.compactness,
        sigma=config.sigma_blur,
    )


def resolutions(images: Array, config: ExtractConfig) -> tuple[int, ...]:
    """Return how many segments each resolution asks for: those set, or those for the size."""
    small = max(images.shape[1:3]) <= SMALL_SIDE
    return config.n_segments or (SMALL if small else LARGE)


def collect(labels: Array, resolutions: tuple[int, ...], config: ExtractConfig) -> Segments:
    """Gather the distinct regions of `labels` int[n r h w], sorted by image, resolution, label."""
    canvas = labels.shape[2:]
    image, level, box, bits = [], [], [], [np.empty(0, np.uint8)]
    for position, maps in enumerate(labels):
        kept = distinct(maps, config.min_area * canvas[0] * canvas[1], config.jaccard)
        for rank, (regions, keep) in enumerate(zip(maps, kept, strict=True)):
            around = find_objects(regions + 1)  # 0 means background there
            for label in np.flatnonzero(keep):
                rows, columns = around[label]
                image.append(position)
                level.append(resolutions[rank])
                box.append((rows.start, columns.start, rows.stop, columns.stop))
                bits.append(np.packbits(regions[rows, columns] == label))
    return Segments(
        np.array(image, np.int32),
        np.array(box, np.int32).reshape(-1, 4),
        np.array(level, np.int16),
        np.cumsum([len(part) for part in bits], dtype=np.int64),
        np.concatenate(bits),
        (int(canvas[0]), int(canvas[1])),
    )


def distinct(maps: Array, min_pixels: float, jaccard: float) -> list[NDArray[np.bool_]]:
    """Return for each resolution of one image, `maps` int[r h w], which labels to keep.

    Kept are regions of more than `min_pixels` whose Jaccard index with every kept region of an
    earlier resolution is at most `jaccard`. All overlaps of two resolutions come from one joint
    histogram.
    """
    flat = maps.reshape(len(maps), -1).astype(np.intp)
    areas = [np.bincount(labels) for labels in flat]
    kept: list[NDArray[np.bool_]] = []
    for later, area in enumerate(areas):
        keep = area > min_pixels
        for earlier in range(later):
            pairs = flat[earlier] * len(area) + flat[later]
            shape = (len(areas[earlier]), len(area))
            both = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
            union = areas[earlier][:, None] + area - both
            repeats = (both > jaccard * union) & kept[earlier][:, None]
            keep &= ~repeats.any(axis=0)
        kept.append(keep)
    return kept
