import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from array_images import image_set, noisy, numbered
from PIL import Image
from torchvision.transforms.v2 import RandomResizedCrop

from dop_fast import crops, seeding
from dop_fast.config import DataConfig
from dop_fast.errors import DataError
from dop_fast.images import ImageSet
from dop_fast.training import TrainData, augment, loader
from dop_fast.types import Array

CPU = torch.device("cpu")
DATA = DataConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
TRAIN_DATA = TrainData(noisy(36, 0), noisy(18, 1), DATA)


def epoch_pixels(images: ImageSet, kind: str, epoch: int = 1, **how: int) -> Array:
    """Return an epoch's pixels in the order of the set, uint8[n s s 3]."""
    order = seeding.stream(5, "any").permutation(len(images))
    chunks = loader.split(order, how.get("batch_size", 4))
    pixels = loader.Pixels(images, how.get("workers", 0), CPU)
    parts = [part for part, _ in loader.training_batches(pixels, chunks, kind, 0, epoch)]
    return torch.cat(parts).numpy()[np.argsort(order)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and torch's loader
@pytest.mark.parametrize("hold_bytes", [0, 2**30])
@pytest.mark.parametrize("kind", ["pad", "resized", "none"])
def test_pixels_depend_on_neither_workers_nor_batches_nor_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str, hold_bytes: int
) -> None:
    images = noisy(10, 0, size=16)
    expected = epoch_pixels(images, kind)
    monkeypatch.setattr(loader, "HOLD_BYTES", hold_bytes)
    assert np.array_equal(epoch_pixels(images, kind, workers=2, batch_size=3), expected)
    assert np.array_equal(epoch_pixels(images, kind, batch_size=10), expected)


@dataclass(frozen=True)
class Unreadable:
    """A source none of whose images can be read."""

    def open(self, index: int) -> Image.Image:
        raise OSError("truncated")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and torch's loader
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_an_unreadable_image_is_named_whoever_reads_it(kind: str, workers: int) -> None:
    images = replace(noisy(4, 0), source=Unreadable())
    with pytest.raises(
        DataError,
        match=r"4 of 4 images, more than 1%, are unreadable: cannot read the image 0: truncated",
    ) as caught:
        epoch_pixels(images, kind, workers=workers)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_every_epoch_augments_anew(kind: str) -> None:
    images = noisy(10, 0, size=16)
    assert not np.array_equal(epoch_pixels(images, kind, 1), epoch_pixels(images, kind, 2))


def test_no_augmentation_gives_the_images_themselves() -> None:
    images = noisy(10, 0)
    assert np.array_equal(epoch_pixels(images, "none"), images.load(range(10)))


def test_pad_is_a_crop_of_the_reflected_image_and_a_flip() -> None:
    size = 16  # so it is padded by 2
    images = numbered(40, size)
    found = epoch_pixels(images, "pad")
    seen = set()
    for pixels, image in zip(found, images.load(range(40)), strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (1, -1)
            if np.array_equal(padded[top : top + size, left : left + size][:, ::flip], pixels)
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {flip for _, _, flip in seen} == {1, -1}


def test_resized_crops_are_boxes_of_the_original_image() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 40, 56, 3), np.uint8)  # originals larger than the set's size
    images = image_set(pixels, np.zeros(6, np.int64), 16)
    for index, found in enumerate(epoch_pixels(images, "resized", 3)):
        drawn = seeding.stream(0, "augment", 3, index)
        top, left, height, width = crops.draw_box(40, 56, drawn)
        crop = Image.fromarray(pixels[index]).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.BILINEAR))
        flipped = drawn.random() < 0.5
        assert np.array_equal(found, expected[:, ::-1] if flipped else expected)


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (100, 400), (400, 100)])
def test_boxes_are_distributed_as_torchvision_s(height: int, width: int) -> None:
    count = 1500
    ours = np.array([crops.draw_box(height, width, seeding.stream(i, "box")) for i in range(count)])
    peer = RandomResizedCrop(8, crops.AREA, crops.RATIO)
    canvas = [torch.empty(3, height, width, device="meta")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [peer.make_params(canvas) for _ in range(count)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in drawn])
    assert (ours >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    deviation = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * deviation + 1e-9).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1)])
def test_a_very_long_image_gives_the_box_in_its_middle(height: int, width: int) -> None:
    long = {(10, 400): (0, 193, 10, 13), (400, 10): (193, 0, 13, 10), (1, 1): (0, 0, 1, 1)}
    assert crops.draw_box(height, width, np.random.default_rng(0)) == long[height, width]


@pytest.mark.parametrize(("size", "kind"), [(32, "pad"), (64, "pad"), (65, "resized")])
def test_auto_pads_small_images_and_resizes_large_ones(size: int, kind: str) -> None:
    assert augment.resolve("auto", size) == kind
    assert augment.resolve("none", size) == "none"


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 1, [1, 1, 1]), (1, 4, [1])],
)
def test_only_a_last_batch_of_one_image_is_left_out(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    chunks = loader.training_order(count, batch_size, 0, 1)
    assert [len(chunk) for chunk in chunks] == sizes
    assert len(set(np.concatenate(chunks).tolist())) == sum(sizes)


def test_each_epoch_has_its_own_order() -> None:
    one, same, two = (loader.training_order(50, 50, 0, epoch)[0] for epoch in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("workers", "device", "gpus", "expected"),
    [
        (-1, "cpu", 0, 0), (3, "cpu", 0, 3), (0, "cuda", 1, 0), (-1, "cuda", 1, 12),
        (-1, "cuda", 4, 3), (-1, "cuda", 16, 1),
    ],
)  # fmt: skip
def test_a_gpu_has_its_share_of_the_cores_to_load_images(
    workers: int, device: str, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert loader.readers(workers, torch.device(device)) == expected
