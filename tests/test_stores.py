import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from dop_fast.errors import StoreError
from dop_fast.stores import Header, PatchStore, PatchWriter, exists
from dop_fast.types import ClassConcepts, Concept, Patches, Segments

HEADER = Header(("cat", "dog"), (9, 7), 117, "data", "teacher", "layer4", {"seed": 0})


def segments(masks: list[np.ndarray], boxes: list[tuple[int, int, int, int]]) -> Segments:
    bits = [np.packbits(mask) for mask in masks]
    return Segments(
        image=np.arange(len(masks), dtype=np.int32),
        box=np.array(boxes, dtype=np.int32).reshape(-1, 4),
        resolution=np.full(len(masks), 15, dtype=np.int16),
        offset=np.cumsum([0, *map(len, bits)]),
        bits=np.concatenate([np.empty(0, np.uint8), *bits]),
        canvas=(9, 7),
    )


def one_class(class_id: int) -> ClassConcepts:
    rng = np.random.default_rng(class_id)
    masks = [rng.random((3, 5)) > 0.5, rng.random((9, 7)) > 0.5, np.ones((1, 1), bool)]
    found = segments(masks, [(1, 1, 4, 6), (0, 0, 9, 7), (8, 6, 9, 7)])
    concepts = (
        Concept(np.array([2, 0], np.int32), 0.75, np.array([0.5, 1.0]), 0.001, 0.9),
        Concept(np.array([1], np.int32), 0.25, np.array([0.25, 0.25]), 0.5, 0.6),
    )
    return ClassConcepts(class_id, found, concepts)


def made(folder: Path) -> PatchStore:
    writer = PatchWriter(folder / "patches.zarr", HEADER)
    writer.write(one_class(0))
    writer.write(ClassConcepts(1, segments([], []), ()))
    return writer.finish()


def some_patches(count: int) -> Patches:
    rng = np.random.default_rng(count)
    return Patches(
        rng.integers(0, 256, (count, 9, 7, 3), dtype=np.uint8),
        rng.random((count, 9, 7)) > 0.4,
        rng.integers(0, 2, count),
        rng.random(count) > 0.5,
    )


def test_a_mask_and_its_area_survive_bit_packing() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random(shape) > 0.5 for shape in ((3, 5), (1, 1), (8, 8), (2, 9))]
    found = segments(masks, [(0, 0, *mask.shape) for mask in masks])
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(found.mask(index), mask)
    assert found.area.tolist() == [int(mask.sum()) for mask in masks]


def test_selected_segments_keep_their_masks() -> None:
    found = one_class(0).segments
    picked = found.select(np.array([2, 0]))
    np.testing.assert_array_equal(picked.mask(1), found.mask(0))
    assert picked.area.tolist() == [found.area[2], found.area[0]]
    assert len(found.select(np.array([], np.int64))) == 0


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    store = PatchStore(made(tmp_path).path)
    wanted, got = one_class(0), store.concepts(0)
    assert store.header == HEADER
    for name in ("image", "box", "resolution", "offset", "bits"):
        np.testing.assert_array_equal(getattr(got.segments, name), getattr(wanted.segments, name))
    for left, right in zip(got.concepts, wanted.concepts, strict=True):
        np.testing.assert_array_equal(left.members, right.members)
        np.testing.assert_array_equal(left.tcav_runs, right.tcav_runs)
        assert (left.tcav, left.p_value) == (right.tcav, right.p_value)
    assert store.concepts(1).concepts == ()


def test_an_interrupted_extraction_goes_on_with_the_class_it_lacks(tmp_path: Path) -> None:
    PatchWriter(tmp_path / "patches.zarr", HEADER).write(one_class(0))
    with pytest.raises(StoreError, match="no store of patches"):
        PatchStore(tmp_path / "patches.zarr")
    again = PatchWriter(tmp_path / "patches.zarr", HEADER)
    assert again.done(0) and not again.done(1)


@pytest.mark.parametrize("step", range(4))
def test_a_store_is_whole_whenever_its_replacement_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    made(tmp_path)
    header, steps = replace(HEADER, fill=0), iter(range(10))

    def stepping(call: Callable[..., object]) -> Callable[..., object]:
        def stepped(*given: object, **how: object) -> object:
            if next(steps) == step:
                raise KeyboardInterrupt
            return call(*given, **how)

        return stepped

    def replaced() -> None:
        writer = PatchWriter(tmp_path / "patches.zarr", header)
        for class_id in range(2):
            if not writer.done(class_id):
                writer.write(one_class(class_id))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", stepping(Path.rename))
            patch.setattr(shutil, "rmtree", stepping(shutil.rmtree))
            writer.finish()

    with pytest.raises(KeyboardInterrupt):
        replaced()
    if exists(tmp_path / "patches.zarr"):
        there = PatchStore(tmp_path / "patches.zarr")
        assert [len(there.concepts(i).concepts) for i in (0, 1)] == [2, 2 * (not there.header.fill)]
    replaced()
    assert PatchStore(tmp_path / "patches.zarr").header.fill == 0
    assert [path.name for path in tmp_path.iterdir()] == ["patches.zarr"]


def test_what_zarr_was_writing_when_it_was_killed_is_removed(tmp_path: Path) -> None:
    writer = PatchWriter(tmp_path / "patches.zarr", HEADER)
    for folder in ("", "classes/"):
        (tmp_path / f"patches.zarr.partial/{folder}zarr.0.partial").touch()
    del writer
    store = made(tmp_path)
    (tmp_path / "patches.zarr/zarr.0.partial").touch()
    store.write_stitched([some_patches(1)], 1, {})
    assert not list(tmp_path.rglob("*.partial"))


def test_a_class_written_in_part_does_not_count(tmp_path: Path) -> None:
    writer = PatchWriter(tmp_path / "patches.zarr", HEADER)
    writer.write(one_class(0))
    (writer.partial / "classes/0").group("a").attrs["finished"] = False
    assert not PatchWriter(tmp_path / "patches.zarr", HEADER).done(0)


def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    PatchWriter(tmp_path / "patches.zarr", HEADER).write(one_class(0))
    other = Header(**{**vars(HEADER), "fill": 0})
    assert not PatchWriter(tmp_path / "patches.zarr", other).done(0)


def test_stitched_patches_survive_the_store(tmp_path: Path) -> None:
    store, parts = made(tmp_path), [some_patches(3), some_patches(2)]
    assert store.stitching is None
    store.write_stitched(parts, 5, {"sigma": 0.5})
    got = PatchStore(store.path).stitched()
    for name in ("pixels", "valid", "label", "reached"):
        wanted = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(got, name), wanted)
    np.testing.assert_array_equal(store.stitched(np.array([4, 0])).label, got.label[[4, 0]])
    assert store.stitching == {"sigma": 0.5}


@pytest.mark.parametrize("sizes", [(1,), (30, 30, 30), (64, 64), (1, 130, 5), (63, 2, 63)])
def test_patches_handed_over_in_parts_of_any_size_are_stored_whole(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    store, parts = made(tmp_path), [some_patches(size) for size in sizes]
    store.write_stitched(iter(parts), sum(sizes), {})
    rows = np.random.default_rng(0).permutation(sum(sizes))
    got, picked = store.stitched(), store.stitched(rows)
    for name in ("pixels", "valid", "label", "reached"):
        wanted = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(got, name), wanted)
        np.testing.assert_array_equal(getattr(picked, name), wanted[rows])


def test_a_failed_stitching_leaves_the_older_patches(tmp_path: Path) -> None:
    store = made(tmp_path)
    store.write_stitched([some_patches(3)], 3, {"sigma": 0.5})

    def broken():
        yield some_patches(2)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.write_stitched(broken(), 4, {"sigma": 0.9})
    assert PatchStore(store.path).stitching == {"sigma": 0.5}
    assert len(store.stitched()) == 3


def test_an_extraction_stopped_before_its_last_rename_goes_on(tmp_path: Path) -> None:
    store = made(tmp_path)
    Path(store.path).rename(tmp_path / "patches.zarr.partial")
    again = PatchWriter(tmp_path / "patches.zarr", HEADER)
    assert again.done(0) and again.done(1)
    assert again.finish().header == HEADER


def test_shares_of_classes_with_fewer_concepts_are_left_out_of_the_mean(tmp_path: Path) -> None:
    store = made(tmp_path)
    parts = [
        replace(some_patches(3), visible=np.full((3, 2), 0.4, np.float32)),
        replace(some_patches(3), visible=np.full((3, 1), 0.2, np.float32)),
    ]
    store.write_stitched(parts, 6, {})
    np.testing.assert_allclose(store.visible(), [0.3, 0.4])
    np.testing.assert_allclose(store.stitched(np.array([5, 0])).visible, [[0.2, np.nan], [0.4] * 2])


@pytest.mark.parametrize("name", ["stitched/pixels", "stitched/label", "classes/0/bits"])
def test_a_flipped_bit_is_found_on_reading(tmp_path: Path, name: str) -> None:
    store = made(tmp_path)
    store.write_stitched([some_patches(5)], 5, {})
    (chunk,) = (
        path for path in (tmp_path / "patches.zarr" / name / "c").rglob("*") if path.is_file()
    )
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match="damaged") as caught:
        store.concepts(0) if name.startswith("classes") else store.stitched(np.array([0, 4]))
    assert "--force" in caught.value.hint


def test_an_address_holds_what_a_folder_does() -> None:
    address = "memory://bucket/patches.zarr"
    writer = PatchWriter(address, HEADER)
    writer.write(one_class(0))
    with pytest.raises(StoreError, match="unfinished"):
        PatchStore(address)
    assert not exists(address)
    again = PatchWriter(address, HEADER)
    assert again.done(0) and not again.done(1)
    again.write(ClassConcepts(1, segments([], []), ()))
    store = again.finish()
    assert exists(address)
    np.testing.assert_array_equal(store.concepts(0).segments.bits, one_class(0).segments.bits)
    assert store.stitching is None
    for count in (3, 2):  # the second in place of the first
        store.write_stitched([some_patches(count)], count, {"sigma": 0.5})
        got = PatchStore(address)
        assert got.stitching == {"sigma": 0.5}
        np.testing.assert_array_equal(got.stitched().pixels, some_patches(count).pixels)
    assert not PatchWriter(address, HEADER).done(0)  # made anew, as a finished folder is


def test_a_stitching_at_an_address_does_not_count_until_it_is_whole() -> None:
    address = "memory://bucket/half.zarr"
    store = PatchWriter(address, HEADER).finish()
    store.write_stitched([some_patches(3)], 3, {"sigma": 0.5})

    def broken() -> Iterator[Patches]:
        yield some_patches(64)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.write_stitched(broken(), 70, {"sigma": 0.9})
    assert store.stitching is None


def test_an_address_that_cannot_be_opened_says_what_is_missing() -> None:
    with pytest.raises(StoreError, match="Protocol not known") as caught:
        PatchStore("nowhere://bucket/patches.zarr")
    assert "fsspec" in caught.value.hint


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_no_store_is_not_replaced(tmp_path: Path, remote: bool) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("you")
    address = f"file://{tmp_path}/letters" if remote else tmp_path / "letters"
    with pytest.raises(StoreError, match="holds something else"):
        PatchWriter(address, HEADER)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "you"


@pytest.mark.parametrize("change", [{"version": 99}, {"schema": "other"}, {"finished": False}])
def test_a_foreign_or_unfinished_store_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    store = made(tmp_path)
    zarr.open_group(store.path).attrs.update(change)
    with pytest.raises(StoreError) as caught:
        PatchStore(store.path)
    assert "dopfast extract" in caught.value.hint


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "patches.zarr").mkdir()
    with pytest.raises(StoreError, match="not a Zarr store"):
        PatchStore(tmp_path / "patches.zarr")


def test_a_missing_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no class 5"):
        made(tmp_path).concepts(5)
