"""SLIC: the compiled version equals the reference, and both keep what they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.segmentation import slic as skimage_slic

from dop_fast.errors import ConfigError
from dop_fast.kernels.slic import cpu, reference, slic


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def blocks(height, width, side=20, seed=0):
    """Return flat blocks with a little noise and, in int, which block a pixel lies in."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-height // side), -(-width // side)
    truth = np.arange(rows * columns).reshape(rows, columns)
    truth = truth.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
    colours = rng.integers(40, 216, (rows * columns, 3))
    image = colours[truth] + rng.normal(0, 6, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), truth


def check_promises(labels, asked):
    areas = np.bincount(labels.ravel())
    asked = min(asked, labels.size)
    assert all(ndimage.label(labels == k)[1] == 1 for k in range(len(areas)))
    assert abs(len(areas) - asked) <= max(1, asked // 20)
    assert (4 * asked * areas >= labels.size).all()


SHAPES = [(1, 1), (1, 9), (9, 1), (2, 2), (1, 200), (33, 17), (40, 64), (65, 131)]
IMAGES = {
    "noise": noise,
    "constant": lambda shape: np.full((*shape, 3), 77, np.uint8),
    "blocks": lambda shape: blocks(*shape)[0],
}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("content", IMAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_labels_equal_the_reference_and_keep_the_promises(shape, content, coarse):
    image = IMAGES[content](shape)[None]
    for compactness, sigma, iterations in ((20.0, 1.0, 10), (0.5, 0.0, 3), (3000.0, 2.6, 1)):
        settings = ((1, 4, 15), compactness, sigma, iterations, coarse)
        labels = cpu.slic(image, *settings)
        np.testing.assert_array_equal(labels, reference.slic(image, *settings))
        for asked, result in zip(settings[0], labels[0], strict=True):
            check_promises(result, asked)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 120),
    st.floats(0.01, 8192),
    st.floats(0, 6),
    st.integers(0, 9),
)
def test_any_size_and_setting_keeps_the_promises(shape, asked, compactness, sigma, seed):
    image = noise(shape, seed) if seed % 2 else blocks(*shape, side=7, seed=seed)[0]
    given_settings = ((asked,), compactness, sigma, 2 + seed % 3, seed % 3 == 0)
    labels = cpu.slic(image[None], *given_settings)
    check_promises(labels[0, 0], asked)
    np.testing.assert_array_equal(labels, reference.slic(image[None], *given_settings))


@pytest.mark.parametrize("asked", [5, 15, 50, 80, 200])
def test_the_number_of_segments_is_the_one_asked(asked):
    photo_like = ndimage.gaussian_filter(noise((224, 224)).astype(float), (8, 8, 0))
    spread = (photo_like - photo_like.min()) / np.ptp(photo_like) * 255
    for image in (spread.astype(np.uint8), noise((224, 224)), blocks(224, 224)[0]):
        check_promises(slic(image[None], [asked])[0, 0], asked)


def test_colours_are_cielab_within_a_thirtieth():
    image = np.concatenate([noise((64, 64)), noise((64, 64)) // 20])
    exact = rgb2lab(image / 255).transpose(2, 0, 1)
    assert np.abs(reference.lab(image) / 64 - exact).max() < 1 / 30


def test_blur_is_the_gaussian_of_scipy():
    planes = reference.lab(blocks(50, 70)[0])
    exact = ndimage.gaussian_filter(planes.astype(float), 1.5, axes=(1, 2), mode="reflect")
    # each of the 6 taps rounds down, in both passes
    assert np.abs(reference.blur(planes, reference.taps(1.5)) - exact).max() < 2 * 6 + 1


def boundary(labels):
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def recall(labels, truth):
    return ndimage.maximum_filter(boundary(labels), 3)[boundary(truth)].mean()


@pytest.mark.parametrize("coarse", [False, True])
def test_edges_are_found_as_well_as_by_scikit_image(coarse):
    image, truth = blocks(150, 210, side=30)
    peer = skimage_slic(image.astype(np.float32) / 255, 60, compactness=20, sigma=1)
    found = slic(image[None], [len(np.unique(peer))], coarse=coarse)[0, 0]
    assert recall(found, truth) > 0.9  # a grid of 60 cells reaches about 0.3
    assert recall(found, truth) >= recall(peer, truth) - 0.01


def test_labels_do_not_depend_on_threads_batch_or_other_resolutions(monkeypatch):
    images = np.stack([blocks(48, 70, seed=k)[0] for k in range(5)])
    alone = np.stack([slic(x[None], [n])[0, 0] for x in images for n in (5, 15)])
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        np.testing.assert_array_equal(slic(images, [5, 15]).reshape(alone.shape), alone)


def test_a_view_is_segmented_like_its_copy():
    images = np.stack([blocks(48, 70)[0]] * 2)[:, ::-1, ::2]
    np.testing.assert_array_equal(slic(images, [9]), slic(images.copy(), [9]))


def test_no_images_and_no_resolutions_give_empty_labels():
    assert slic(np.empty((0, 8, 8, 3), np.uint8), [4]).shape == (0, 1, 8, 8)
    assert slic(np.zeros((2, 8, 8, 3), np.uint8), []).shape == (2, 0, 8, 8)


@pytest.mark.parametrize(
    ("images", "asked", "options"),
    [
        (np.zeros((1, 8, 8, 3)), [4], {}),
        (np.zeros((8, 8, 3), np.uint8), [4], {}),
        (np.zeros((1, 0, 8, 3), np.uint8), [4], {}),
        (np.zeros((1, 8, 8, 3), np.uint8), [0], {}),
        (np.zeros((1, 8, 8, 3), np.uint8), [4], {"iterations": 0}),
        (np.zeros((1, 8, 8, 3), np.uint8), [4], {"compactness": float("nan")}),
        (np.zeros((1, 8, 8, 3), np.uint8), [4], {"sigma": -1.0}),
    ],
)
def test_wrong_input_is_refused(images, asked, options):
    with pytest.raises(ConfigError):
        slic(images, asked, **options)
