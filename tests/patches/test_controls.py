"""Ablations and controls of what a network is scored on."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from little_store import CLASSES, FILL, all_of, denormal, gather, on_fill

from dop_fast.config import DataConfig, StitchConfig
from dop_fast.images import ImageSet
from dop_fast.patches import baselines, stitching
from dop_fast.stores import PatchStore


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
