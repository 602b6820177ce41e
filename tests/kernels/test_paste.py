"""Cover and paint against sets of pixels, for the NumPy reference and for the compiled twin."""

import ctypes
import mmap
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest

from dop_fast.kernels.paste import cpu, reference
from dop_fast.types import Array, Segments

CANVASES = [(1, 1), (5, 3), (32, 32), (7, 130), (9, 64), (8, 65), (40, 48)]
twins = pytest.mark.parametrize("paste", [reference, cpu], ids=["reference", "cpu"])


def pack(masks: list[Array], image: list[int] | None = None) -> Segments:
    """Return whole masks bool[h w] as segments, each of its own image unless said."""
    boxes, parts = [], []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        boxes.append((top, left, bottom, right))
        parts.append(np.packbits(mask[top:bottom, left:right]))
    return Segments(
        np.array(range(len(masks)) if image is None else image, np.int32),
        np.array(boxes, np.int32).reshape(-1, 4),
        np.full(len(masks), 15, np.int16),
        np.cumsum([0, *map(len, parts)]),
        np.concatenate([np.empty(0, np.uint8), *parts]),
        masks[0].shape,
    )


def scribbles(canvas: tuple[int, int], count: int, rng: np.random.Generator) -> list[Array]:
    """Return masks of all kinds: specks, the whole canvas, blobs with holes and in parts."""
    masks = []
    for index in range(count):
        mask = np.zeros(canvas, np.bool_)
        top, left = (rng.integers(0, extent) for extent in canvas)
        if index % 5 == 0:
            mask[top, left] = True
        elif index % 5 == 1:
            mask[:] = True
        else:
            part = mask[top : top + rng.integers(1, 30), left : left + rng.integers(1, 90)]
            part[:] = rng.random(part.shape) < rng.choice([0.2, 0.7, 1.0])
            mask[top, left] = True
        masks.append(mask)
    return masks


@twins
@pytest.mark.parametrize("canvas", CANVASES)
def test_what_is_seen_of_a_segment_is_what_paint_leaves_of_it(
    paste: ModuleType, canvas: tuple[int, int]
) -> None:
    rng = np.random.default_rng(canvas[0])
    masks = scribbles(canvas, 12, rng)
    placements, starts = rng.integers(0, 12, 40), np.array([0, 1, 1, 15, 38])
    seen = paste.visible(pack(masks), placements, starts)
    for start, end in pairwise(starts):
        shown = np.full(canvas, -1)
        for at in range(start, end):
            shown[masks[placements[at]]] = at
        assert seen[start:end].tolist() == [np.sum(shown == at) for at in range(start, end)]
    assert not seen[38:].any()


def pixels_of(mask: Array) -> set[tuple[int, int]]:
    return {(int(y), int(x)) for y, x in np.argwhere(mask)}


def covered_by_sets(masks: list[Array], queue: Array, sigma: float, count: int) -> list[int]:
    """Return what cover should: Algorithm 2's loop on sets of coordinates."""
    everything = set().union(*(pixels_of(masks[index]) for index in queue.ravel()))
    ends: list[int] = []
    union: set[tuple[int, int]] = set()
    for position, row in enumerate(queue):
        for index in row:
            union |= pixels_of(masks[index])
        if len(union) / masks[0].size >= sigma or union == everything:
            ends.append(position + 1)
            union = set()
    return ends[:count]


@twins
@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("sigma", [0.01, 0.5, 0.99])
def test_cover_counts_the_union_as_sets_do(
    paste: ModuleType, canvas: tuple[int, int], sigma: float
) -> None:
    rng = np.random.default_rng(canvas[1])
    masks = [mask for mask in scribbles(canvas, 20, rng) if mask.sum() == 1 or not mask.all()]
    queue = rng.integers(0, len(masks), (30, 3))
    ends = paste.cover(pack(masks), queue, sigma, 6)
    assert ends.tolist() == covered_by_sets(masks, queue, sigma, 6)


@twins
def test_cover_counts_a_pixel_of_many_segments_once(paste: ModuleType) -> None:
    half = np.zeros((4, 8), np.bool_)
    half[:, :4] = True
    most = np.ones((4, 8), np.bool_)
    most[0, 0] = False
    queue = np.array([[0, 0], [0, 0], [1, 0]])
    assert paste.cover(pack([half, most]), queue, 0.6, 1).tolist() == [3]


@twins
def test_cover_ends_at_exactly_the_coverage_asked(paste: ModuleType) -> None:
    tiles = [np.arange(10)[None] == column for column in range(10)]
    queue = np.arange(10)[:, None]
    for count in range(1, 10):  # 0.1 * 3 > 0.3 in floats, 3 / 10 is not
        assert paste.cover(pack(tiles), queue, count / 10, 1).tolist() == [count]


@twins
def test_cover_ends_where_nothing_new_can_come(paste: ModuleType) -> None:
    corner, beside = np.zeros((2, 8, 8), np.bool_)
    corner[:2, :2], beside[:2, :4] = True, True
    queue = np.array([[0], [0], [1], [1], [0]])
    assert paste.cover(pack([corner, beside]), queue, 0.75, 9).tolist() == [3, 4]


@twins
def test_cover_of_no_rounds_ends_nowhere(paste: ModuleType) -> None:
    whole = pack([np.ones((3, 3), np.bool_)])
    assert paste.cover(whole, np.empty((0, 1), np.int64), 0.5, 2).tolist() == []


@twins
@pytest.mark.parametrize("canvas", CANVASES)
def test_paint_shows_the_last_segment_of_each_pixel(
    paste: ModuleType, canvas: tuple[int, int]
) -> None:
    rng = np.random.default_rng(canvas[1])
    masks = scribbles(canvas, 15, rng)
    image = rng.integers(0, 4, len(masks))
    sources = rng.integers(0, 256, (4, *canvas, 3), np.uint8)
    placements = np.array([*rng.integers(0, len(masks), 12), 0, 2, 3])
    starts = np.array([0, 0, 1, 8, 12, 15])  # one canvas has none
    pixels, valid = paste.paint(pack(masks, list(image)), sources, placements, starts, 117)
    for canvas_id, start in enumerate(starts[:-1]):
        shown = {}
        for index in placements[start : starts[canvas_id + 1]]:
            shown |= dict.fromkeys(pixels_of(masks[index]), image[index])
        for y in range(canvas[0]):
            for x in range(canvas[1]):
                expected = sources[shown[y, x], y, x] if (y, x) in shown else [117] * 3
                assert pixels[canvas_id, y, x].tolist() == list(expected)
                assert valid[canvas_id, y, x] == ((y, x) in shown)


@pytest.mark.parametrize("canvas", [(224, 224), (97, 321)])
def test_the_compiled_twin_equals_the_reference_on_large_images(canvas: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    masks = [mask for mask in scribbles(canvas, 60, rng) if not mask.all()]
    sources = rng.integers(0, 256, (3, *canvas, 3), np.uint8)
    segments = pack(masks, list(rng.integers(0, 3, len(masks))))
    queue = rng.integers(0, len(masks), (40, 5))
    ends = reference.cover(segments, queue, 0.2, 5)
    assert cpu.cover(segments, queue, 0.2, 5).tolist() == ends.tolist()
    starts = np.array([0, 20, 90, 200])
    for ours, plain in zip(
        cpu.paint(segments, sources, queue.ravel(), starts, 0),
        reference.paint(segments, sources, queue.ravel(), starts, 0),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, plain)


@twins
def test_arrays_of_other_layouts_give_the_same(paste: ModuleType) -> None:
    rng = np.random.default_rng(2)
    segments = pack(scribbles((20, 70), 6, rng), [0, 1, 2, 0, 1, 2])
    sources = rng.integers(0, 256, (6, 20, 70, 3), np.uint8)[::2]
    odd = replace(
        segments,
        box=np.asfortranarray(segments.box.astype(np.int64)),
        image=np.repeat(segments.image, 2)[::2].astype(np.int64),
    )
    order, starts = np.arange(6)[::-1], np.array([0, 2, 6], np.int32)
    usual = paste.paint(segments, sources.copy(), order.copy(), starts.astype(np.int64), 9)
    for ours, plain in zip(paste.paint(odd, sources, order, starts, 9), usual, strict=True):
        np.testing.assert_array_equal(ours, plain)
    assert (
        paste.cover(odd, order[:, None].astype(np.int32), 0.4, 2).tolist()
        == paste.cover(segments, order[:, None].copy(), 0.4, 2).tolist()
    )


def test_what_would_leave_the_arrays_is_refused() -> None:
    segments = pack([np.ones((4, 4), np.bool_), np.ones((4, 4), np.bool_)])
    sources, order, starts = np.zeros((2, 4, 4, 3), np.uint8), np.arange(2), np.array([0, 2])
    beyond = replace(segments, box=segments.box + np.array([0, 0, 0, 1], np.int32))
    cut = replace(segments, bits=segments.bits[:-1])
    for wrong in (beyond, cut):
        with pytest.raises(ValueError, match="canvas"):
            cpu.paint(wrong, sources, order, starts, 0)
        with pytest.raises(ValueError, match="canvas"):
            cpu.cover(wrong, order[:, None], 0.5, 1)
    with pytest.raises(ValueError, match="index"):
        cpu.cover(segments, np.array([[2]]), 0.5, 1)
    with pytest.raises(ValueError, match="index"):
        cpu.paint(segments, sources, np.array([-1]), np.array([0, 1]), 0)
    with pytest.raises(ValueError, match="sources"):
        cpu.paint(segments, sources[:1], order, starts, 0)
    with pytest.raises(ValueError, match="fit"):
        cpu.paint(segments, sources[:, :3], order, starts, 0)
    with pytest.raises(ValueError, match="placements"):
        cpu.paint(segments, sources, order, np.array([0, 3]), 0)


@pytest.mark.skipif(sys.platform == "win32", reason="has no mprotect")
def test_the_last_pixels_of_the_last_source_are_read_where_it_ends() -> None:
    """The sources fill their memory to the last byte of a page; behind it nothing can be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    everything = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mprotect.restype = ctypes.c_int
    assert libc.mprotect(everything.ctypes.data + page, page, 0) == 0
    canvas = (9, 64)
    sources = everything[page - 9 * 64 * 3 : page].reshape(1, *canvas, 3)
    sources[:] = np.random.default_rng(3).integers(0, 256, sources.shape)
    whole = pack([np.ones(canvas, np.bool_)])
    pixels, valid = cpu.paint(whole, sources, np.array([0]), np.array([0, 1]), 117)
    np.testing.assert_array_equal(pixels, sources)
    assert valid.all()


@twins
def test_no_segments_paint_the_fill(paste: ModuleType) -> None:
    whole = pack([np.ones((3, 3), np.bool_)])
    sources, none = np.zeros((1, 3, 3, 3), np.uint8), np.empty(0, np.int64)
    pixels, valid = paste.paint(whole, sources, none, np.array([0, 0]), 117)
    assert (pixels == 117).all() and not valid.any()
