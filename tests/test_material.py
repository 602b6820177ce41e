"""What a network is scored on: exact counts, the same at every iteration, one chunk at a time."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dop_fast.concepts.segments import collect
from dop_fast.config import DataConfig, ExtractConfig, PruneConfig, StitchConfig
from dop_fast.errors import DataError, StoreError
from dop_fast.images import ImageSet, open_images
from dop_fast.patches import material, stitching
from dop_fast.patches.material import Material
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import Array, ClassConcepts, Concept

KINDS = ("stitched", "patches", "random-segments", "images", "ones")
CPU = torch.device("cpu")
SIZE, FILL, CLASSES = 32, 117, 3


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> DataConfig:
    return DataConfig(path=str(tiny_images), size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def images(data: DataConfig) -> ImageSet:
    return open_images(data, Path(), 0)[0]


def concepts_of(images: ImageSet, class_id: int) -> ClassConcepts:
    """Return a class's images cut into 4 x 4 tiles, the first 24 of them as 3 concepts."""
    own = images.of_class(class_id)[:4]
    row = np.arange(SIZE) // 8
    labels = np.broadcast_to(row[:, None] * 4 + row, (len(own), 1, SIZE, SIZE))
    segments = collect(labels, (15,), ExtractConfig(min_area=0.0))
    members = np.random.default_rng(class_id).permutation(len(segments)).astype(np.int32)
    concepts = tuple(
        Concept(members[8 * rank : 8 * rank + 8], 0.9, np.full(3, 0.9), 0.0, 0.9)
        for rank in range(3)
    )
    segments = replace(segments, image=own[segments.image].astype(np.int32))
    return ClassConcepts(class_id, segments, concepts)


@pytest.fixture(scope="module")
def store(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    header = Header(
        images.classes, (SIZE, SIZE), FILL, images.fingerprint, "teacher", "layer", {"top": 3}
    )
    writer = PatchWriter(tmp_path_factory.mktemp("store") / "patches.zarr", header)
    for class_id in range(CLASSES):
        writer.write(concepts_of(images, class_id))
    made = writer.finish()
    config = StitchConfig(sigma=0.5, per_class=6)
    parts = stitching.stitch_all(made, images, config, 0)
    made.write_stitched(parts, 6 * CLASSES, config.to_dict())
    return made


def gather(
    kind: str, store: PatchStore | None, images: ImageSet, data: DataConfig, **settings: int
) -> Material:
    config = PruneConfig(**{"per_class": 5, "batch_size": 4, **settings})
    return material.gather(kind, store, images, data, config, seed=0, device=CPU)


def normal(pixels: Array, data: DataConfig) -> Array:
    """Return float64[n 3 h w] from uint8[n h w 3]."""
    scaled = (pixels / 255.0 - np.array(data.mean)) / np.array(data.std)
    return scaled.transpose(0, 3, 1, 2)


def denormal(batches: Iterable[tuple[Tensor, Tensor]], data: DataConfig) -> list[tuple[int, Array]]:
    """Return label and uint8[h w 3] of every item."""
    items = []
    for pixels, labels in batches:
        scaled = pixels.double().numpy().transpose(0, 2, 3, 1)
        exact = (scaled * np.array(data.std) + np.array(data.mean)) * 255
        rounded = np.rint(exact)
        assert abs(exact - rounded).max() < 1e-3
        items += list(zip(labels.tolist(), rounded.astype(np.uint8), strict=True))
    return items


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_gives_exactly_as_many_as_asked(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    labels = [label for _, batch in gather(kind, store, images, data) for label in batch.tolist()]
    assert Counter(labels) == {0: 5, 1: 5, 2: 5}


@pytest.mark.parametrize("kind", KINDS)
def test_material_iterates_again_with_the_same_batches(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    once = gather(kind, store, images, data)
    passes = [list(once), list(once), list(gather(kind, store, images, data))]
    for batches in passes[1:]:
        for (pixels, labels), (again, labels_again) in zip(passes[0], batches, strict=True):
            assert torch.equal(pixels, again) and torch.equal(labels, labels_again)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_a_network_takes(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    for pixels, labels in gather(kind, store, images, data):
        assert pixels.dtype == torch.float32 and labels.dtype == torch.int64
        assert pixels.shape == (len(labels), 3, SIZE, SIZE)
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert pixels.isfinite().all()


@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 5, 7, 100])
def test_chunks_are_even_and_never_of_one(
    per_class: int, batch_size: int, images: ImageSet, data: DataConfig
) -> None:
    made = gather("ones", None, images, data, per_class=per_class, batch_size=batch_size)
    sizes = [len(labels) for _, labels in made]
    assert sum(sizes) == per_class * CLASSES
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch_size, 3)


def test_chunks_mix_the_classes(images: ImageSet, data: DataConfig) -> None:
    made = gather("ones", None, images, data, per_class=200, batch_size=100)
    for _, labels in made:
        assert (torch.bincount(labels, minlength=CLASSES) > 15).all()


def test_another_seed_draws_another_material(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    config = PruneConfig(per_class=4, batch_size=100)
    for kind in ("patches", "random-segments", "images"):
        one, other = (
            next(iter(material.gather(kind, store, images, data, config, seed=seed, device=CPU)))
            for seed in (0, 1)
        )
        assert not torch.equal(one[0].sum(0), other[0].sum(0))


def test_pixels_are_normalised_with_the_mean_and_std_of_the_data(
    images: ImageSet, data: DataConfig
) -> None:
    made = gather("images", None, images, data, per_class=12)
    shown = sorted(pixels.double().numpy().tobytes() for batch, _ in made for pixels in batch)
    assert len(set(shown)) == len(images)
    total = sum(batch.double().sum(0) for batch, _ in made)
    expected = normal(images.load(np.arange(len(images))), data).sum(0)
    np.testing.assert_allclose(total, expected, atol=1e-4)


def test_images_are_different_ones_of_their_class(images: ImageSet, data: DataConfig) -> None:
    items = denormal(gather("images", None, images, data), data)
    known = {pixels.tobytes(): images.labels[i] for i, pixels in enumerate(all_of(images))}
    assert [known[pixels.tobytes()] for _, pixels in items] == [label for label, _ in items]
    assert len({pixels.tobytes() for _, pixels in items}) == len(items)


def all_of(images: ImageSet) -> Iterator[Array]:
    return iter(images.load(np.arange(len(images))))


@pytest.mark.parametrize("kind", ["patches", "random-segments"])
def test_patches_show_one_segment_of_their_class_in_place(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    found = [store.concepts(class_id) for class_id in range(CLASSES)]
    possible = []
    for each in found:
        members = np.concatenate([concept.members for concept in each.concepts])
        pool = members if kind == "patches" else np.arange(len(each.segments))
        possible.append({on_fill(each, index, images) for index in pool})
    items = denormal(gather(kind, store, images, data), data)
    assert all(pixels.tobytes() in possible[label] for label, pixels in items)
    assert len({pixels.tobytes() for _, pixels in items}) == len(items)


def on_fill(found: ClassConcepts, index: int, images: ImageSet) -> bytes:
    top, left, bottom, right = found.segments.box[index]
    pixels = np.full((SIZE, SIZE, 3), FILL, np.uint8)
    image = images.load([found.segments.image[index]])[0]
    pixels[top:bottom, left:right] = image[top:bottom, left:right]  # tiles fill their boxes
    return pixels.tobytes()


def test_stitched_material_is_what_the_store_holds(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    patches = store.stitched()
    stored = Counter(
        (int(label), pixels.tobytes())
        for label, pixels in zip(patches.label, patches.pixels, strict=True)
    )
    items = denormal(gather("stitched", store, images, data, per_class=6), data)
    assert Counter((label, pixels.tobytes()) for label, pixels in items) == stored


def test_all_one_matrices_are_ones_after_normalisation(images: ImageSet, data: DataConfig) -> None:
    assert all((pixels == 1).all() for pixels, _ in gather("ones", None, images, data))


@pytest.mark.parametrize("kind", ["patches", "random-segments", "images"])
def test_pixels_are_read_when_their_chunk_comes(
    kind: str,
    store: PatchStore,
    images: ImageSet,
    data: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[int] = []
    load = ImageSet.load

    def counted(self: ImageSet, index: Array) -> Array:
        loaded.append(len(index))
        return load(self, index)

    monkeypatch.setattr(ImageSet, "load", counted)
    made = gather(kind, store, images, data)
    assert loaded == []
    for position, _ in enumerate(made):
        assert len(loaded) == position + 1
        assert loaded[-1] <= 4


def test_too_few_stitched_patches_say_how_to_make_more(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    with pytest.raises(StoreError, match=r"6 stitched patches .* 9 are asked") as caught:
        gather("stitched", store, images, data, per_class=9)
    assert "dopfast stitch --per-class 9 --force" in caught.value.hint


@pytest.mark.parametrize(
    ("kind", "have"), [("patches", 24), ("random-segments", 64), ("images", 12)]
)
def test_too_few_of_anything_else_say_how_many_there_are(
    kind: str, have: int, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    assert len(list(gather(kind, store, images, data, per_class=have, batch_size=100))) == (
        -(-have * CLASSES // 100)
    )
    with pytest.raises(DataError, match=str(have)) as caught:
        gather(kind, store, images, data, per_class=have + 1)
    assert f"--per-class {have}" in caught.value.hint


def test_patches_without_a_store_say_what_to_run(images: ImageSet, data: DataConfig) -> None:
    with pytest.raises(StoreError) as caught:
        gather("patches", None, images, data)
    assert caught.value.hint == "run: dopfast extract"
