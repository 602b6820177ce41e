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
from dop_fast.config import MATERIALS, DataConfig, ExtractConfig, PruneConfig, StitchConfig
from dop_fast.errors import ConfigError, DataError, StoreError
from dop_fast.images import ImageSet, open_images
from dop_fast.patches import baselines, material, stitching
from dop_fast.patches.cropping import Augment
from dop_fast.patches.material import KINDS, WITHOUT_STORE, Material
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import Array, ClassConcepts, Concept

BALANCED = tuple(kind for kind in KINDS if kind not in ("images-random", "less-patch"))
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


@pytest.mark.parametrize("per_class", [1, 5, 6])
@pytest.mark.parametrize("kind", BALANCED)
def test_every_class_gives_exactly_as_many_as_asked(
    kind: str, per_class: int, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    made = gather(kind, store, images, data, per_class=per_class)
    labels = [label for _, batch in made for label in batch.tolist()]
    assert Counter(labels) == dict.fromkeys(range(CLASSES), per_class)
    assert made.notes == ()


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


def test_an_unknown_material_names_those_there_are(images: ImageSet, data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="grey-ish") as caught:
        gather("grey-ish", None, images, data)
    assert "stitched-reversed" in caught.value.hint


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
def test_a_class_with_fewer_gives_all_of_them_repeatedly_and_is_named(
    kind: str, have: int, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    assert gather(kind, store, images, data, per_class=have).notes == ()
    made = gather(kind, store, images, data, per_class=have + 3)
    items = denormal(made, data)
    assert Counter(label for label, _ in items) == dict.fromkeys(range(CLASSES), have + 3)
    shown = Counter((label, pixels.tobytes()) for label, pixels in items)
    assert set(shown.values()) == {1, 2} and len(shown) == have * CLASSES
    (note,) = made.notes
    assert f"than {have + 3}" in note and f"blue ({have})" in note and f"red ({have})" in note


def test_a_class_with_fewer_concepts_is_named_and_one_without_is_refused(
    store: PatchStore, images: ImageSet, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    concepts = PatchStore.concepts

    def fewer(left: int) -> None:
        def cut(self: PatchStore, class_id: int) -> ClassConcepts:
            found = concepts(self, class_id)
            return replace(found, concepts=found.concepts[: left if class_id == 1 else 3])

        monkeypatch.setattr(PatchStore, "concepts", cut)

    fewer(2)
    made = gather("patches", store, images, data)
    (note,) = made.notes
    assert "fewer concepts than 3" in note and "green (2)" in note and "blue" not in note
    assert Counter(label for _, batch in made for label in batch.tolist())[1] == 5
    fewer(0)
    with pytest.raises(DataError, match="class green has nothing"):
        gather("patches", store, images, data)


# --- ablations and controls
def test_unbalanced_images_are_drawn_from_all_with_their_own_labels(
    images: ImageSet, data: DataConfig
) -> None:
    made = gather("images-random", None, images, data)
    known = {pixels.tobytes(): images.labels[i] for i, pixels in enumerate(all_of(images))}
    items = denormal(made, data)
    assert len({pixels.tobytes() for _, pixels in items}) == 15
    assert [known[pixels.tobytes()] for _, pixels in items] == [label for label, _ in items]
    assert set(Counter(label for label, _ in items).values()) != {5}


def test_less_patch_is_one_patch_of_each_class_whatever_is_asked(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    less = denormal(gather("less-patch", store, images, data), data)
    one = denormal(gather("patches", store, images, data, per_class=1), data)
    assert sorted(label for label, _ in less) == [0, 1, 2]
    assert {pixels.tobytes() for _, pixels in less} == {pixels.tobytes() for _, pixels in one}


def test_grey_is_the_fill_and_nothing_else(images: ImageSet, data: DataConfig) -> None:
    assert all(
        (pixels == FILL).all() for _, pixels in denormal(gather("grey", None, images, data), data)
    )


def test_noise_has_the_mean_and_the_deviation_of_the_data(
    images: ImageSet, data: DataConfig
) -> None:
    pixels = torch.cat([batch for batch, _ in gather("noise", None, images, data)])
    assert pixels.mean().abs() < 0.02 and (pixels.std() - 1).abs() < 0.02
    assert len({image.numpy().tobytes() for image in pixels}) == 15
    assert (pixels[..., 1:] * pixels[..., :-1]).mean().abs() < 0.02


@pytest.mark.parametrize("kind", ["patches", "stitched"])
def test_blurred_patches_keep_shape_and_colour_and_lose_detail(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    plain, soft = (
        denormal(gather(each, store, images, data), data) for each in (kind, f"{kind}-blurred")
    )
    for (label, before), (label_after, after) in zip(plain, soft, strict=True):
        own = (before != FILL).any(2)
        assert label == label_after and (after[~own] == FILL).all()
        before, after = before[own].astype(float), after[own].astype(float)
        assert abs(before.mean(0) - after.mean(0)).max() < 5
        assert after.std(0).mean() < 0.8 * before.std(0).mean()


def test_blurring_is_a_weighted_mean_over_the_patch_alone() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (1, 20, 20, 3), np.uint8)
    valid = rng.random((1, 20, 20)) < 0.4
    found = baselines.blurred(pixels, valid, FILL)[0]
    y, x = np.nonzero(valid[0])
    for row, column in zip(y, x, strict=True):
        weight = np.exp(-((y - row) ** 2 + (x - column) ** 2) / 2)  # a twentieth of 20 pixels
        expected = (weight[:, None] * pixels[0, y, x]).sum(0) / weight.sum()
        assert abs(found[row, column] - expected).max() < 1.5
    assert (found[~valid[0]] == FILL).all()


@pytest.mark.parametrize("kind", ["stitched", "patches", "images"])
def test_permuted_labels_go_with_the_same_pixels_in_the_same_order(
    kind: str, store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    plain, permuted = (
        list(gather(each, store, images, data)) for each in (kind, f"{kind}-permuted")
    )
    for (pixels, _), (same, _) in zip(plain, permuted, strict=True):
        assert torch.equal(pixels, same)
    labels, other = (torch.cat([batch for _, batch in made]) for made in (plain, permuted))
    assert not torch.equal(labels, other)
    assert torch.equal(labels.sort()[0], other.sort()[0])


def test_patches_in_reverse_use_up_the_least_important_concept_first(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    items = denormal(gather("patches-reversed", store, images, data, per_class=10), data)
    for class_id in range(CLASSES):
        found = store.concepts(class_id)
        possible = [
            {on_fill(found, index, images) for index in concept.members}
            for concept in found.concepts
        ]
        own = [pixels.tobytes() for label, pixels in items if label == class_id]
        assert [sum(one in each for one in own) for each in possible] == [0, 2, 8]


def test_stitched_in_reverse_is_stitched_with_the_concepts_reversed(
    store: PatchStore, images: ImageSet, data: DataConfig
) -> None:
    items = denormal(gather("stitched-reversed", store, images, data, per_class=6), data)
    config = StitchConfig(sigma=0.5, per_class=6)
    for class_id in range(CLASSES):
        found = store.concepts(class_id)
        found = replace(found, concepts=found.concepts[::-1])
        expected = stitching.stitch_class(found, images.load, config, FILL, 0).pixels
        own = [pixels for label, pixels in items if label == class_id]
        assert Counter(map(bytes, own)) == Counter(map(bytes, expected))


# --- augmentation
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
