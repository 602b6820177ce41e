"""Algorithm 2 and the discriminative patches, on segments whose pixels tell which one they are.

Every segment is of its own image, and image i is of one colour, i, so what a patch shows can be
traced back.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pytest

from dop_fast.concepts.segments import collect
from dop_fast.config import ExtractConfig, StitchConfig
from dop_fast.errors import DataError, StoreError
from dop_fast.patches import baselines, dop
from dop_fast.patches.dop import Load
from dop_fast.patches.stitching import stitch_class
from dop_fast.seeding import stream
from dop_fast.types import Array, ClassConcepts, Concept, Patches, Segments

FILL = 255
Pixel: TypeAlias = tuple[int, int]


def load_for(canvas: tuple[int, int]) -> Load:
    def load(index: Array) -> Array:
        assert max(index) < FILL
        colours = np.asarray(index, np.uint8)[:, None, None, None]
        return np.broadcast_to(colours, (len(index), *canvas, 3)).copy()

    return load


def class_of(labels: Array, sizes: Sequence[int], class_id: int = 0) -> ClassConcepts:
    """Return concepts of the given sizes from regions of `labels` int[n h w], best first."""
    segments = collect(labels[:, None], (15,), ExtractConfig(min_area=0.0))
    assert sum(sizes) <= len(segments)
    segments = replace(segments, image=np.arange(len(segments), dtype=np.int32))
    shuffled = np.random.default_rng(class_id).permutation(len(segments)).astype(np.int32)
    members = np.split(shuffled[: sum(sizes)], np.cumsum(sizes)[:-1])
    runs = np.linspace(0.9, 0.6, len(sizes))
    concepts = tuple(
        Concept(part, score, np.full(4, score), 0.0, 0.9)
        for part, score in zip(members, runs, strict=True)
    )
    return ClassConcepts(class_id, segments, concepts)


def blotches(canvas: tuple[int, int], images: int, regions: int, seed: int = 0) -> Array:
    """Return label maps of random Voronoi cells, int[n h w]."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.mgrid[: canvas[0], : canvas[1]], axis=-1)[..., None, :]
    maps = [
        np.hypot(*np.moveaxis(grid - rng.uniform(0, canvas, (regions, 2)), -1, 0)).argmin(-1)
        for _ in range(images)
    ]
    return np.stack(maps)


def tiles(side: int, across: int) -> Array:
    """Return one label map of across x across equal tiles."""
    row = np.arange(side) // (side // across)
    return (row[:, None] * across + row)[None]


def stitch(found: ClassConcepts, seed: int = 0, **settings: object) -> Patches:
    config = StitchConfig.from_dict(settings, "stitch")
    return stitch_class(found, load_for(found.segments.canvas), config, FILL, seed)


def literal(found: ClassConcepts, config: StitchConfig, seed: int) -> list[dict[Pixel, int]]:
    """Return Algorithm 2 on dictionaries: for each patch, which segment each pixel shows."""
    concepts = list(reversed(found.concepts))
    streams = [stream(seed, "stitch", found.class_id, rank) for rank in range(len(concepts))]
    waiting: list[list[int]] = [[] for _ in concepts]
    everything = set().union(*(at(found.segments, i) for c in concepts for i in c.members))
    patches = []
    for _ in range(config.per_class):
        popped: list[tuple[int, int]] = []
        union: set[Pixel] = set()
        area = found.segments.canvas[0] * found.segments.canvas[1]
        while len(union) / area < config.sigma and union != everything:
            for rank, concept in enumerate(concepts):
                if not waiting[rank]:
                    order = streams[rank].permuted(np.arange(len(concept.members)))
                    waiting[rank] = concept.members[order].tolist()
                segment = waiting[rank].pop(0)
                popped.append((rank, segment))
                union |= at(found.segments, segment)
        if config.order == "importance":
            popped.sort(key=lambda item: item[0])
        shown: dict[Pixel, int] = {}
        for _, segment in popped:
            shown |= dict.fromkeys(at(found.segments, segment), segment)
        patches.append(shown)
    return patches


def at(segments: Segments, index: int) -> set[Pixel]:
    """Return the pixels of a segment."""
    top, left = segments.box[index, :2]
    return {(int(y + top), int(x + left)) for y, x in np.argwhere(segments.mask(index))}


def visible(patches: Patches, found: ClassConcepts) -> Array:
    """Return the share of all patches that each concept is seen in, best concept first."""
    colour = patches.pixels[..., 0]
    return np.array([np.isin(colour, concept.members).mean() for concept in found.concepts])


@pytest.mark.parametrize("order", ["round", "importance"])
@pytest.mark.parametrize(
    ("canvas", "regions", "sizes"),
    [((32, 32), 9, (7, 3, 12)), ((19, 70), 12, (1, 9)), ((13, 65), 40, (30, 2, 20, 11))],
)
def test_stitching_is_algorithm_2(
    canvas: tuple[int, int], regions: int, sizes: tuple[int, ...], order: str
) -> None:
    found = class_of(blotches(canvas, 4, regions), sizes, class_id=2)
    config = StitchConfig(sigma=0.6, per_class=7, order=order)
    patches = stitch(found, 5, sigma=0.6, per_class=7, order=order)
    for pixels, valid, shown in zip(
        patches.pixels, patches.valid, literal(found, config, 5), strict=True
    ):
        expected = np.full((*canvas, 3), FILL)
        for place, segment in shown.items():
            expected[place] = segment
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(valid, expected[..., 0] != FILL)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.75, 0.95])
def test_stitching_reaches_the_coverage_asked(sigma: float) -> None:
    found = class_of(blotches((224, 224), 5, 46), (40,) * 5)
    patches = stitch(found, sigma=sigma, per_class=10)
    assert patches.reached.all()
    assert (patches.coverage >= sigma).all()
    np.testing.assert_allclose(patches.coverage, (patches.pixels != FILL).any(-1).mean((1, 2)))


def test_coverage_overshoots_by_less_than_a_round() -> None:
    found = class_of(tiles(32, 8), (16, 16, 16))
    patches = stitch(found, sigma=0.5, per_class=1)  # 32 of 64 tiles; 11 rounds of 3 tiles are 33
    assert patches.coverage.tolist() == [33 / 64]


def test_coverage_that_cannot_be_reached_ends_the_patch() -> None:
    found = class_of(tiles(32, 4), (3, 1))
    patches = stitch(found, sigma=0.75, per_class=6)
    assert not patches.reached.any()
    assert patches.coverage.tolist() == [4 / 16] * 6
    members = np.concatenate([concept.members for concept in found.concepts])
    for pixels in patches.pixels:
        assert set(np.unique(pixels)) == {*members, FILL}


def test_full_coverage_of_the_canvas_is_reached_from_its_segments() -> None:
    found = class_of(tiles(16, 4), (10, 6))
    patches = stitch(found, sigma=0.999, per_class=3)
    assert patches.reached.all() and patches.valid.all()


def test_no_segment_is_taken_twice_before_all_are_taken() -> None:
    found = class_of(tiles(32, 4), (16,))
    patches = stitch(found, sigma=0.25, per_class=12)  # 4 of 16 tiles each
    shown = [set(np.unique(pixels)) - {FILL} for pixels in patches.pixels]
    fillings = [shown[0:4], shown[4:8], shown[8:12]]
    for filling in fillings:
        assert sum(map(len, filling)) == len(set().union(*filling)) == 16
    assert fillings[0] != fillings[1] != fillings[2]


def test_a_short_concept_refills_by_itself() -> None:
    found = class_of(tiles(32, 8), (40, 2))
    patches = stitch(found, sigma=0.3, per_class=5)
    often, seldom = found.concepts[1].members, found.concepts[0].members
    shown = [set(np.unique(pixels)) - {FILL} for pixels in patches.pixels]
    assert all(set(often) <= colours for colours in shown)
    first = [colours & set(seldom) for colours in shown[:2]]
    assert not first[0] & first[1]


def test_the_most_important_segment_of_a_round_is_on_top() -> None:
    found = class_of(blotches((40, 40), 6, 5), (8, 8, 8))
    for order in ("round", "importance"):
        patches = stitch(found, sigma=0.01, per_class=20, order=order)  # one round each
        best = set(found.concepts[0].members.tolist())
        for pixels in patches.pixels[..., 0]:
            (top,) = best & set(np.unique(pixels).tolist())
            assert set(zip(*map(list, np.nonzero(pixels == top)), strict=True)) == at(
                found.segments, top
            )


def test_in_order_of_importance_what_is_seen_rises_with_importance() -> None:
    found = class_of(blotches((64, 64), 5, 46), (40,) * 5)
    settings = {"sigma": 0.75, "per_class": 40}
    literal_order = stitch(found, **settings)
    importance = stitch(found, **settings, order="importance")
    shares = visible(importance, found)
    assert (np.diff(shares) < 0).all()  # best first
    assert shares[0] > visible(literal_order, found)[0]
    np.testing.assert_array_equal(importance.valid, literal_order.valid)  # the same segments


@pytest.mark.parametrize("cells", ["specks", "whole"])
def test_specks_and_whole_images_are_stitched(cells: str) -> None:
    labels = tiles(12, 12) if cells == "specks" else np.zeros((4, 12, 12), np.int64)
    found = class_of(labels, (60, 60) if cells == "specks" else (2, 2))
    patches = stitch(found, sigma=0.7, per_class=1)
    # 51 rounds of 2 pixels are the first to reach 0.7 * 144 = 100.8
    assert patches.coverage.tolist() == [102 / 144 if cells == "specks" else 1.0]


def test_a_class_does_not_depend_on_those_stitched_before() -> None:
    classes = [class_of(blotches((32, 32), 4, 12, seed), (12, 12), seed) for seed in range(3)]
    forward = [stitch(found) for found in classes]
    backward = [stitch(found) for found in reversed(classes)][::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.label.tolist() == other.label.tolist()


def test_seed_and_class_change_the_draw() -> None:
    found = class_of(blotches((32, 32), 4, 12), (12, 12))
    patches = stitch(found, 0).pixels
    assert (patches != stitch(found, 1).pixels).any()
    assert (patches != stitch(replace(found, class_id=1), 0).pixels).any()


def test_fewer_patches_are_the_first_of_more() -> None:
    found = class_of(blotches((32, 32), 4, 12), (12, 5, 9))
    np.testing.assert_array_equal(
        stitch(found, per_class=3).pixels, stitch(found, per_class=11).pixels[:3]
    )


def test_an_empty_concept_gives_nothing_and_stops_nobody() -> None:
    found = class_of(blotches((32, 32), 4, 12), (12, 5))
    empty = replace(found.concepts[0], members=np.empty(0, np.int32))
    with_empty = replace(found, concepts=(empty, *found.concepts))
    np.testing.assert_array_equal(stitch(with_empty).pixels, stitch(found).pixels)


def test_a_class_without_concepts_says_what_to_do() -> None:
    found = replace(class_of(blotches((8, 8), 1, 3), (2,)), concepts=())
    with pytest.raises(StoreError) as caught:
        stitch(found)
    assert "dopfast extract" in caught.value.hint


@pytest.mark.parametrize("order", ["round", "importance"])
def test_the_share_of_each_concept_is_what_the_pixels_show(order: str) -> None:
    found = class_of(blotches((40, 40), 5, 12), (9, 4, 7), class_id=1)
    patches = stitch(found, sigma=0.8, per_class=6, order=order)
    assert patches.visible is not None
    colour = patches.pixels[..., 0]
    expected = [np.isin(colour, c.members).mean(axis=(1, 2)) for c in found.concepts]
    np.testing.assert_allclose(patches.visible, np.stack(expected, axis=1), atol=1e-6)


def test_only_images_that_are_seen_are_loaded_and_once() -> None:
    found = class_of(blotches((16, 16), 3, 10), (4, 3))
    covers_all = class_of(np.zeros((8, 16, 16), np.int64), (4, 3))
    for each, patches in ((found, 10), (covers_all, 2)):
        _only_seen_images_are_loaded(each, patches)


def _only_seen_images_are_loaded(found: ClassConcepts, count: int) -> None:
    asked: list[int] = []

    def load(index: Array) -> Array:
        asked.extend(index)
        return load_for((16, 16))(index)

    patches = stitch_class(found, load, StitchConfig(per_class=count), FILL, 0)
    assert sorted(asked) == sorted(set(np.unique(patches.pixels)) - {FILL})


@pytest.mark.parametrize(
    ("sizes", "count", "given"),
    [
        ((9, 9, 9, 9, 9), 10, [2, 2, 2, 2, 2]),
        ((9, 9, 9, 9, 9), 30, [6, 6, 6, 6, 6]),
        ((9, 9, 9), 10, [4, 3, 3]),
        ((1, 9, 2, 9), 13, [1, 5, 2, 5]),
        ((1, 9, 2, 9), 14, [1, 6, 2, 5]),
        ((9, 9, 9), 2, [1, 1, 0]),
    ],
)
def test_patches_are_spread_over_the_concepts(
    sizes: tuple[int, ...], count: int, given: list[int]
) -> None:
    found = class_of(blotches((32, 32), 4, 15), sizes)
    chosen = dop.choose(found, count, 0)
    assert len(set(chosen)) == count
    assert [np.isin(chosen, concept.members).sum() for concept in found.concepts] == given


def test_patches_are_drawn_at_random_and_fewer_are_the_first_of_more() -> None:
    found = class_of(blotches((32, 32), 4, 15), (20, 20))
    draws = {tuple(dop.choose(found, 4, seed)) for seed in range(20)}
    assert len(draws) > 15
    assert dop.choose(found, 4, 0).tolist() == dop.choose(found, 9, 0)[:4].tolist()
    counts = np.bincount(np.concatenate([dop.choose(found, 20, seed) for seed in range(300)]))
    members = np.concatenate([concept.members for concept in found.concepts])
    assert abs(counts[members] - 150).max() < 50  # Binomial(300, 1/2): five standard deviations 43


def test_a_patch_is_its_segment_in_place_on_the_fill() -> None:
    found = class_of(blotches((24, 70), 3, 15), (8, 8), class_id=3)
    drawn = found.segments.select(dop.choose(found, 6, 1))
    patches = dop.render(drawn, load_for((24, 70)), FILL, np.full(6, found.class_id))
    for segment, pixels, valid in zip(
        dop.choose(found, 6, 1), patches.pixels, patches.valid, strict=True
    ):
        expected = np.full((24, 70, 3), FILL)
        for place in at(found.segments, segment):
            expected[place] = segment
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(valid, expected[..., 0] != FILL)
    assert patches.label.tolist() == [3] * 6
    assert patches.reached.all()


def test_random_segments_are_drawn_from_all_of_the_class() -> None:
    found = class_of(blotches((32, 32), 4, 15), (5,))
    drawn = [baselines.random_segments(found, 30, seed) for seed in range(30)]
    assert all(len(set(draw)) == 30 for draw in drawn)
    assert set(np.concatenate(drawn)) == set(range(len(found.segments)))


def test_too_few_segments_say_how_many_there_are() -> None:
    found = class_of(blotches((8, 8), 1, 6), (2, 1))
    with pytest.raises(DataError, match=r"3 segments .* 4 are asked") as caught:
        dop.choose(found, 4, 0)
    assert "--per-class 3" in caught.value.hint
    with pytest.raises(DataError) as caught:
        baselines.random_segments(found, 100, 0)
    assert f"--per-class {len(found.segments)}" in caught.value.hint


def test_joined_segments_are_those_of_the_parts() -> None:
    parts = [class_of(blotches((9, 70), 2, 7, seed), (2,)).segments for seed in range(3)]
    joined = dop.join(parts)
    assert len(joined) == sum(map(len, parts))
    each = [(part, index) for part in parts for index in range(len(part))]
    for position, (part, index) in enumerate(each):
        assert at(joined, position) == at(part, index)
        assert joined.image[position] == part.image[index]
