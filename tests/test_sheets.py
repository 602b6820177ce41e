"""Contact sheets hold the pixels of the right segment at the right place."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dop_fast.config import ExtractConfig
from dop_fast.report import sheets, tiles
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import ClassConcepts, Concept, Patches, Segments

SIZE, SIDE, STEP = 16, sheets.FILM.side, sheets.FILM.side + tiles.GAP
LEFT, TOP = sheets.MARGIN + sheets.LABEL, sheets.TITLE


@dataclass(frozen=True)
class _Plain:
    """Images of one colour each: their index in every channel."""

    size: int = SIZE

    def load(self, index: np.ndarray) -> np.ndarray:
        return np.stack([np.full((self.size, self.size, 3), i, np.uint8) for i in index])


@pytest.fixture
def store(tmp_path: Path) -> PatchStore:
    """Return one class with two concepts; segment i is the left half of image 10 i."""
    segments = Segments(
        image=np.arange(12, dtype=np.int32) * 10,
        box=np.tile(np.array([0, 0, SIZE, SIZE // 2], np.int32), (12, 1)),
        resolution=np.full(12, 5, np.int16),
        offset=np.arange(13) * SIZE * SIZE // 2 // 8,
        bits=np.full(12 * SIZE * SIZE // 2 // 8, 255, np.uint8),
        canvas=(SIZE, SIZE),
    )
    first = Concept(np.arange(10, dtype=np.int32), 0.8, np.full(4, 0.8), 0.001, 0.9)
    second = Concept(np.array([11, 10], np.int32), 0.4, np.full(4, 0.4), 0.5, 0.6)
    header = Header(("one",), (SIZE, SIZE), 117, "data", "teacher", "layer",
                    ExtractConfig().to_dict())  # fmt: skip
    writer = PatchWriter(tmp_path / "patches.zarr", header)
    writer.write(ClassConcepts(0, segments, (first, second)))
    return writer.finish()


def test_a_concept_sheet_has_a_row_a_concept_and_eight_columns(store: PatchStore) -> None:
    sheet = sheets.concepts(store, 0, _Plain())  # type: ignore[arg-type]
    films = 2 * (2 * STEP - tiles.GAP + sheets.MARGIN)
    assert sheet.size == (LEFT + 8 * STEP - tiles.GAP + sheets.MARGIN, TOP + films)


def test_a_concept_sheet_shows_each_segment_in_place_above_its_source(store: PatchStore) -> None:
    sheet = np.asarray(sheets.concepts(store, 0, _Plain()))  # type: ignore[arg-type]
    quarter = SIDE // 4
    second_row = TOP + 2 * STEP - tiles.GAP + sheets.MARGIN
    for top, column, image in (
        (TOP, 0, 0),
        (TOP, 7, 70),
        (second_row, 0, 110),
        (second_row, 1, 100),
    ):
        left = LEFT + column * STEP
        middle = top + SIDE // 2
        assert sheet[middle, left + quarter].tolist() == [image] * 3
        assert sheet[middle, left + 3 * quarter].tolist() == [117] * 3
        below = middle + STEP
        assert sheet[below, left + quarter].tolist() == [image] * 3
        assert sheet[below, left + 3 * quarter].tolist() == [int(image * tiles.DIM)] * 3
    assert (sheet[second_row : second_row + SIDE, LEFT + 2 * STEP :] == 255).all()  # no third


def test_the_outline_runs_along_the_region(store: PatchStore) -> None:
    sheet = np.asarray(sheets.concepts(store, 0, _Plain()))  # type: ignore[arg-type]
    row = sheet[TOP + STEP + SIDE // 2, LEFT + 7 * STEP : LEFT + 7 * STEP + SIDE, 0]
    bright = np.flatnonzero(row > 200)
    assert set(bright[(bright > 2) & (bright < SIDE - 3)]) <= set(
        range(SIDE // 2 - 3, SIDE // 2 + 2)
    )
    assert len(bright) >= 2


def test_stitched_patches_stand_in_a_row_for_each_class() -> None:
    pixels = np.stack([np.full((SIZE, SIZE, 3), 20 * i, np.uint8) for i in range(5)])
    valid = np.ones((5, SIZE, SIZE), np.bool_)
    patches = Patches(pixels, valid, np.array([0, 2, 0, 2, 2]), np.ones(5, np.bool_))
    sheet = sheets.stitched(patches, ("a", "b", "c"))
    rows = 2 * (SIDE + sheets.MARGIN)
    assert sheet.size == (LEFT + 3 * STEP - tiles.GAP + sheets.MARGIN, TOP + rows)
    shown = np.asarray(sheet)[TOP + SIDE // 2 :: SIDE + sheets.MARGIN, LEFT + SIDE // 2 :: STEP, 0]
    assert shown[:2, :3].tolist() == [[0, 40, 255], [20, 60, 80]]


def test_what_is_seen_of_each_concept_stands_beside_the_patches() -> None:
    pixels = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    plain = Patches(pixels, np.ones((2, SIZE, SIZE), np.bool_), np.zeros(2, int), np.ones(2, bool))
    seen = replace(plain, visible=np.array([[0.4, 0.1], [0.2, 0.3]], np.float32))
    without, beside = (np.asarray(sheets.stitched(each, ("a",))) for each in (plain, seen))
    changed = np.argwhere((without != beside).any(-1))
    assert changed[:, 1].max() < LEFT and changed[:, 0].min() >= TOP + 3 * sheets.LINE
    assert sheets.seen(seen.visible) == ["of each concept:", "30, 20 %"]


def test_boundaries_lie_where_labels_change_and_nowhere_else() -> None:
    image = np.full((8, 8, 3), 90, np.uint8)
    halves = np.repeat([[0, 1]], 8, axis=0).repeat(4, axis=1)
    whole = np.zeros((8, 8), np.int32)
    sheet = np.asarray(sheets.segments(image, np.stack([halves, whole]), side=80))
    top, gap = sheets.TITLE + sheets.CAPTION, 2 * tiles.GAP
    assert sheet.shape == (top + 80 + sheets.MARGIN, 2 * sheets.MARGIN + 160 + gap, 3)
    first = sheet[top : top + 80, sheets.MARGIN : sheets.MARGIN + 80]
    second_left = sheets.MARGIN + 80 + gap
    second = sheet[top : top + 80, second_left : second_left + 80]
    assert np.unique(np.nonzero((first == sheets.EDGE).all(axis=2))[1]).tolist() == [39]
    assert (first[:, [38, 40]] == sheets.INK).all()
    assert (first[:, :38] == 90).all()
    assert (first[:, 41:] == 90).all()
    assert (second == 90).all()


def test_many_stitched_patches_go_on_in_the_next_row() -> None:
    count = sheets.FILM.count + 1
    patches = Patches(
        np.zeros((count, SIZE, SIZE, 3), np.uint8), np.ones((count, SIZE, SIZE), np.bool_),
        np.zeros(count, np.int64), np.ones(count, np.bool_),
    )  # fmt: skip
    sheet = np.asarray(sheets.stitched(patches, ("a",)))
    assert not sheet[TOP + STEP : TOP + STEP + SIDE, LEFT : LEFT + SIDE].any()
    assert sheet[TOP + STEP : TOP + STEP + SIDE, LEFT + STEP : LEFT + STEP + SIDE].all()


def test_a_name_that_is_too_long_ends_before_the_edge() -> None:
    image, labels = np.full((8, 8, 3), 90, np.uint8), np.zeros((1, 8, 8), np.int32)
    title = np.asarray(sheets.segments(image, labels, "name " * 50))[: sheets.TITLE]
    written = np.flatnonzero((title < 255).any((0, 2)))
    assert 0 < written[-1] < title.shape[1] - sheets.MARGIN
