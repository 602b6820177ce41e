"""Segments against label maps, brute force and a bicubic filter written out."""

import numpy as np
import pytest

from dop_fast.concepts.segments import collect, distinct, segment
from dop_fast.config import SMALL_SIDE, ExtractConfig

EVERYTHING = ExtractConfig(min_area=0, jaccard=1)


def voronoi(rng: np.random.Generator, count: int, shape: tuple[int, int]) -> np.ndarray:
    """Return labels 0..count-1 of the nearest of `count` random pixels."""
    seeds = rng.permutation(shape[0] * shape[1])[:count]
    y, x = np.mgrid[: shape[0], : shape[1]]
    apart = (y[..., None] - seeds // shape[1]) ** 2 + (x[..., None] - seeds % shape[1]) ** 2
    return apart.argmin(axis=-1).astype(np.int32)


def maps_of(seed: int, counts: tuple[int, ...], images: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    maps = [[voronoi(rng, count, (24, 30)) for count in counts] for _ in range(images)]
    repeated = np.array(maps)
    repeated[:, -1, :, :15] = repeated[:, 0, :, :15] % counts[-1]  # so that something repeats
    for image in repeated:
        image[-1] = np.unique(image[-1], return_inverse=True)[1].reshape(24, 30)
    return repeated


def brute_force(maps: np.ndarray, min_pixels: float, jaccard: float) -> list[list[bool]]:
    """Decide region by region with whole masks, as the published code does."""
    earlier: list[np.ndarray] = []
    decided = []
    for labels in maps:
        keep, masks = [], []
        for label in range(labels.max() + 1):
            mask = labels == label
            repeats = [(mask & old).sum() / (mask | old).sum() > jaccard for old in earlier]
            keep.append(bool(mask.sum() > min_pixels and not any(repeats)))
            masks += [mask] if keep[-1] else []
        earlier += masks
        decided.append(keep)
    return decided


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("jaccard", [0.25, 0.5, 0.75])
def test_repetitions_are_those_of_pairwise_masks(seed: int, jaccard: float) -> None:
    (maps,) = maps_of(seed, (4, 7, 12))
    expected = brute_force(maps, 10, jaccard)
    assert [list(keep) for keep in distinct(maps, 10, jaccard)] == expected
    assert not all(map(all, expected))


def test_a_repetition_of_a_dropped_region_is_kept() -> None:
    first = np.zeros((10, 10), int)
    first[0, 0] = 1  # too small
    second = first.copy()
    keep = distinct(np.array([first, second, first]), 1, 0.5)
    assert [list(level) for level in keep] == [[True, False], [False, False], [False, False]]
    keep = distinct(np.array([first, 1 - first]), 0, 0.999)
    assert [list(level) for level in keep] == [[True, True], [False, False]]


def test_regions_of_one_resolution_never_drop_each_other() -> None:
    halves = np.repeat([[0], [1]], 5, axis=0).repeat(10, axis=1)
    assert distinct(halves[None], 0, 0.0)[0].all()


def test_every_label_of_every_map_becomes_a_segment() -> None:
    labels = maps_of(3, (5, 9), images=3)
    found = collect(labels, (5, 9), EVERYTHING)
    row = 0
    for image, maps in enumerate(labels):
        for resolution, regions in zip((5, 9), maps, strict=True):
            for label in range(regions.max() + 1):
                canvas = np.zeros(found.canvas, bool)
                top, left, bottom, right = found.box[row]
                mask = found.mask(row)
                canvas[top:bottom, left:right] = mask
                assert np.array_equal(canvas, regions == label)
                assert mask.any(0)[[0, -1]].all() and mask.any(1)[[0, -1]].all()  # tight
                assert (found.image[row], found.resolution[row]) == (image, resolution)
                assert found.area[row] == (regions == label).sum()
                row += 1
    assert row == len(found)


def test_a_region_of_exactly_the_smallest_area_is_dropped() -> None:
    labels = np.zeros((1, 1, 10, 10), np.int32)
    labels[..., 0, :5] = 1
    assert len(collect(labels, (2,), ExtractConfig(min_area=0.05))) == 1
    assert len(collect(labels, (2,), ExtractConfig(min_area=0.049))) == 2


@pytest.mark.parametrize(
    ("side", "expected"), [(SMALL_SIDE, {5, 10, 15}), (SMALL_SIDE + 1, {15, 50, 80})]
)
def test_resolutions_follow_the_size_of_the_images(side: int, expected: set[int]) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), np.uint8)
    config = ExtractConfig(jaccard=1, min_area=0)
    assert set(segment(photo, config).resolution) == expected
    assert set(segment(photo, ExtractConfig(n_segments=(7,))).resolution) == {7}


def test_segments_without_limits_tile_every_image() -> None:
    photos = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), np.uint8)
    found = segment(photos, EVERYTHING)
    for image in range(3):
        areas = found.area[found.image == image]
        assert areas.sum() == 3 * 40 * 40
