"""What a network is scored on: the pixels of what was asked for, the same at every iteration."""

from collections import Counter

import numpy as np
import pytest
import torch
from little_store import CLASSES, SIZE, all_of, denormal, gather, normal, on_fill
from torch import Tensor

from dop_fast.config import MATERIALS, DataConfig, PruneConfig
from dop_fast.errors import ConfigError, StoreError
from dop_fast.images import ImageSet
from dop_fast.patches import material
from dop_fast.patches.cropping import Augment
from dop_fast.patches.material import KINDS, WITHOUT_STORE
from dop_fast.stores import PatchStore
from dop_fast.types import Array

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(WITHOUT_STORE)))
def test_patches_without_a_store_say_what_to_run(
    kind: str, images: ImageSet, data: DataConfig
) -> None:
    with pytest.raises(StoreError) as caught:
        gather(kind, None, images, data)
    assert caught.value.hint == "run: dopfast extract"


@pytest.mark.parametrize("kind", WITHOUT_STORE)
def test_other_material_needs_no_store(kind: str, images: ImageSet, data: DataConfig) -> None:
    assert sum(len(labels) for _, labels in gather(kind, None, images, data)) == 15


def test_an_unknown_material_names_the_nearest(images: ImageSet, data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="grey-ish") as caught:
        gather("grey-ish", None, images, data)
    assert caught.value.hint == "did you mean 'grey'?"


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


@pytest.mark.parametrize("augment", ["published", "guaranteed"])
@pytest.mark.parametrize("kind", ["patches", "stitched", "images"])
def test_crops_are_the_same_at_every_iteration_and_in_chunks_of_any_size(
    augment: Augment, kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    def pixels_of(batch_size: int) -> Tensor:
        config = PruneConfig(per_class=5, batch_size=batch_size, augment=augment)
        made = material.gather(kind, store, images, data, config, seed=0, device=CPU)
        once, again = (torch.cat([batch for batch, _ in made]) for _ in range(2))
        assert torch.equal(once, again)
        return once

    assert torch.equal(pixels_of(4), pixels_of(100))
    plain = torch.cat([batch for batch, _ in gather(kind, store, images, data)])
    assert not torch.equal(pixels_of(4), plain)


def test_every_material_can_be_asked_for() -> None:
    assert material.KINDS == MATERIALS
