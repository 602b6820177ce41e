"""How well superpixels keep known boundaries: scenes of known truth, BSDS500, the measures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Labels = NDArray[Any]
Scene = tuple[NDArray[np.uint8], list[Labels]]
"""An image and what its annotators drew (of a made scene: the one truth)."""
OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
"""Directions of lightness, red-green and yellow-blue: neighbours differ little, as in photos."""
MEASURES = ("boundary recall", "undersegmentation error", "ASA", "compactness")


def scene(seed: int, height: int = 240, width: int = 320) -> Scene:
    """Return an image and its regions: warped cells, each of its own colour, texture and shading.

    Rendered at twice the size and averaged, so that the edges are as soft as a camera's.
    """
    rng = np.random.default_rng(seed)
    shape = (2 * height, 2 * width)
    place = np.indices(shape).astype(float)
    warped = place + np.stack([_smooth(rng, shape, 24) for _ in range(2)]) * 16
    sites = rng.uniform(0, 1, (40, 2)) * shape
    cell = np.argmin([(warped[0] - y) ** 2 + (warped[1] - x) ** 2 for y, x in sites], axis=0)
    image = np.zeros((*shape, 3))
    for k in range(len(sites)):
        colour = 0.45 + rng.normal(0, [0.1, 0.06, 0.06]) @ OPPONENT
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
        wave = np.sin((place[0] * np.sin(angle) + place[1] * np.cos(angle)) * 2 * np.pi / period)
        grain = _smooth(rng, shape, rng.uniform(1, 6))
        texture = rng.uniform(0, 0.05) * wave + rng.uniform(0, 0.06) * grain
        image[cell == k] = (colour + texture[..., None] * rng.uniform(0.5, 1, 3))[cell == k]
    image *= 1 + 0.15 * _smooth(rng, shape, 120)[..., None]
    image = image.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
    image += rng.normal(0, 0.015, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), [cell[::2, ::2]]


def _smooth(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> NDArray[np.float64]:
    noise = ndimage.gaussian_filter(rng.normal(size=shape), scale, mode="wrap")
    return np.asarray(noise / noise.std())


def bsds(folder: Path, count: int) -> Iterator[Scene]:
    """Yield the first `count` test images of BSDS500 with all annotators' segmentations."""
    from PIL import Image
    from scipy.io import loadmat

    for path in sorted(folder.rglob("images/test/*.jpg"))[:count]:
        truth = next(folder.rglob(f"groundTruth/test/{path.stem}.mat"))
        drawn = loadmat(truth)["groundTruth"][0]
        yield np.asarray(Image.open(path)), [x["Segmentation"][0, 0] for x in drawn]


def boundary(labels: Labels) -> NDArray[np.bool_]:
    """Mark the pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def measures(labels: Labels, truth: Labels) -> NDArray[np.float64]:
    """Return `MEASURES`: recall within one pixel, Neubert-Protzel's error, ASA, roundness."""
    edge = boundary(truth)
    near = ndimage.maximum_filter(boundary(labels), 3)
    _, segment, area = np.unique(labels, return_inverse=True, return_counts=True)
    _, region = np.unique(truth, return_inverse=True)
    overlap = np.zeros((segment.max() + 1, region.max() + 1), np.int64)
    np.add.at(overlap, (segment.ravel(), region.ravel()), 1)
    error = np.minimum(overlap, area[:, None] - overlap).sum() / labels.size
    return np.array(
        [
            near[edge].mean() if edge.any() else 1.0,
            error,
            overlap.max(axis=1).sum() / labels.size,
            _roundness(segment.reshape(labels.shape), area),
        ]
    )


def _roundness(segment: Labels, area: Labels) -> float:
    """Return the mean of 4 pi area / perimeter^2 over pixels; perimeters include the border."""
    padded = np.pad(segment, 1, constant_values=-1)
    perimeter = np.zeros(len(area) + 1, np.int64)
    for one, other in ((padded[:, 1:], padded[:, :-1]), (padded[1:], padded[:-1])):
        for side in (one, other):
            np.add.at(perimeter, side[one != other], 1)  # -1, the outside, counts at the end
    return float((area * 4 * np.pi * area / perimeter[:-1] ** 2).sum() / area.sum())


def at_counts(
    method: Callable[[NDArray[np.uint8], int], Labels],
    scenes: Sequence[Scene],
    counts: Sequence[int],
) -> NDArray[np.float64]:
    """Return `MEASURES` float64[counts 4], means over annotators, then scenes.

    Methods return other numbers of segments than asked; a quadratic in their logarithm through
    the method's own three points gives the measures at just those numbers.
    """
    found = []
    for n in counts:
        results = []
        for image, truths in scenes:
            labels = method(image, n)
            mean = np.mean([measures(labels, truth) for truth in truths], axis=0)
            results.append([np.log(len(np.unique(labels))), *mean])
        found.append(np.mean(results, axis=0))
    points = np.array(found)
    powers = np.vander(points[:, 0], len(counts))
    return np.asarray(
        np.vander(np.log(counts), len(counts)) @ np.linalg.solve(powers, points[:, 1:])
    )
