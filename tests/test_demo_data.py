from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_score
from torchvision.datasets import ImageFolder

from dop_fast import demo, seeding
from dop_fast.errors import DataError, StoreError
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import ClassConcepts, Concept, Segments

SIZE, TRAIN, VAL = 48, 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "images"
    demo.write_images(path, 3, size=SIZE, train=TRAIN, val=VAL)
    return path


def test_the_written_tree_is_a_folder_of_classes(folder):
    for split, count in (("train", TRAIN), ("val", VAL)):
        images = ImageFolder(folder / split)
        assert images.classes == sorted(demo.CLASSES)
        assert np.bincount(images.targets).tolist() == [count] * len(demo.CLASSES)
        assert images[0][0].size == (SIZE, SIZE)
    assert [path.name for path in folder.parent.iterdir()] == ["images"], "no partial is left"


def test_an_existing_folder_is_not_written_over(folder):
    with pytest.raises(StoreError, match="already there"):
        demo.write_images(folder, 0, train=1, val=1)


def test_the_truth_names_the_training_images_and_is_where_the_object_changed_them(folder):
    truth = demo.load_truth(folder)
    written = {str(path.relative_to(folder)) for path in (folder / "train").rglob("*.png")}
    assert set(truth.names) == written
    images = ImageFolder(folder / "train")
    for (path, _), mask in zip(images.samples, truth.masks, strict=True):
        name, index = Path(path).parent.name, int(Path(path).stem)
        rng = seeding.stream(3, "demo", "train", name, index)
        without = demo.background(SIZE, rng)
        changed = (np.asarray(images.loader(path)) != without).any(axis=2)
        assert not changed[~mask].any()
        assert changed[mask].mean() > 0.9  # an edge pixel barely touched may round to its old value


def test_a_folder_without_truth_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"truth\.npz"):
        demo.load_truth(tmp_path)


@pytest.mark.parametrize("name", demo.CLASSES)
def test_an_object_lies_inside_the_image_and_covers_the_share_promised(name):
    low, high = demo.OBJECT_SHARE
    size = 192  # the ring of pixels that are only touched is thin here
    for index in range(10):
        _, mask = demo.draw(name, size, seeding.stream(0, "place", name, index))
        assert low < mask.mean() < 1.15 * high
        assert not mask[[0, -1]].all() and not mask[:, [0, -1]].all()


def test_images_follow_from_the_seed_alone(folder, tmp_path):
    demo.write_images(tmp_path / "again", 3, size=SIZE, train=TRAIN + 1, val=1)
    demo.write_images(tmp_path / "other", 4, size=SIZE, train=1, val=1)
    for name in demo.CLASSES:
        first = Path("train", name, "0000.png")
        content = (folder / first).read_bytes()
        assert (tmp_path / "again" / first).read_bytes() == content
        assert (tmp_path / "other" / first).read_bytes() != content
        assert (folder / "val" / name / "0000.png").read_bytes() != content


def test_backgrounds_do_not_tell_the_class():
    classes, each = len(demo.CLASSES), 80
    pictures = [
        demo.background(32, seeding.stream(0, "demo", "train", name, index))
        for name in demo.CLASSES
        for index in range(each)
    ]
    flat = np.reshape(pictures, (classes * each, -1, 3)).astype(float)
    colours = np.concatenate([flat.mean(axis=1), flat.std(axis=1)], axis=1)
    label = np.repeat(np.arange(classes), each)
    accuracy = cross_val_score(LinearDiscriminantAnalysis(), colours, label, cv=5).mean()
    chance = 1 / classes
    spread = np.sqrt(chance * (1 - chance) / len(label))
    assert abs(accuracy - chance) < 4 * spread


@dataclass(frozen=True)
class Names:
    """The part of an image set that the measure reads."""

    names: tuple[str, ...]


def _store(path: Path, found: list[ClassConcepts], canvas: tuple[int, int]) -> PatchStore:
    header = Header(("left", "right"), canvas, 117, "data", "teacher", "layer", {})
    writer = PatchWriter(path, header)
    for one in found:
        writer.write(one)
    return writer.finish()


def _segments(rows: list[tuple[int, tuple[int, int, int, int], list[list[int]]]]) -> Segments:
    bits = [np.packbits(np.array(mask, np.bool_)) for _, _, mask in rows]
    return Segments(
        image=np.array([image for image, _, _ in rows], np.int32),
        box=np.array([box for _, box, _ in rows], np.int32).reshape(-1, 4),
        resolution=np.full(len(rows), 15, np.int16),
        offset=np.cumsum([0, *map(len, bits)], dtype=np.int64),
        bits=np.concatenate([np.empty(0, np.uint8), *bits]),
        canvas=(4, 4),
    )


def _concept(members: list[int]) -> Concept:
    return Concept(np.array(members, np.int32), 0.9, np.array([0.8, 1.0]), 0.001, 0.95)


@pytest.fixture
def small_world():
    """Two images of 4 x 4 px; the objects are the left half of one, one pixel of the other."""
    masks = np.zeros((2, 4, 4), np.bool_)
    masks[0, :, :2] = True
    masks[1, 3, 3] = True
    truth = demo.Truth(("train/right/0007.png", "train/left/0007.png"), masks[::-1])
    left = _segments(
        [
            (0, (0, 0, 2, 3), [[1, 1, 1], [1, 0, 1]]),  # 3 of 5 on the object
            (0, (0, 2, 4, 4), [[1, 1]] * 4),  # 0 of 8
            (0, (2, 0, 4, 2), [[1, 1], [1, 1]]),  # 4 of 4
        ]
    )
    right = _segments([(1, (2, 2, 4, 4), [[0, 1], [1, 1]])])  # 1 of 3
    found = [
        ClassConcepts(0, left, (_concept([2]), _concept([0]))),
        ClassConcepts(1, right, ()),
    ]
    return found, truth, Names(("left/0007.png", "right/0007.png"))


def test_precision_is_the_share_of_pixels_counted_by_hand(small_world, tmp_path):
    found, truth, images = small_world
    result = demo.precision(_store(tmp_path / "p.zarr", found, (4, 4)), images, truth)
    left, right = result.per_class
    assert result.concepts == left.concepts == pytest.approx(7 / 9)
    assert left.random == pytest.approx(7 / 17)
    assert result.random == pytest.approx(8 / 20)
    assert (left.name, right.name) == ("left", "right")
    assert np.isnan(right.concepts) and right.random == pytest.approx(1 / 3)


def test_precision_refuses_a_truth_of_other_images(small_world, tmp_path):
    found, truth, images = small_world
    store = _store(tmp_path / "p.zarr", found, (4, 4))
    with pytest.raises(DataError, match=r"no image left/0007\.png"):
        demo.precision(store, images, demo.Truth(truth.names[:1], truth.masks[:1]))
    with pytest.raises(DataError, match=r"the truth of \(8, 8\) px"):
        demo.precision(store, images, demo.Truth(truth.names, np.zeros((2, 8, 8), np.bool_)))
