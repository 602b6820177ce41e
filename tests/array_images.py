"""Image sets made of arrays, for tests of what is read from them."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dop_fast.images import ImageSet
from dop_fast.types import Array


@dataclass(frozen=True)
class Arrays:
    """A picklable source of images."""

    pixels: Array

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def image_set(pixels: Array, labels: Array, size: int = 8) -> ImageSet:
    classes = tuple(f"class {i}" for i in range(int(labels.max()) + 1))
    names = tuple(map(str, range(len(labels))))
    return ImageSet(classes, labels.astype(np.int64), names, size, "made up", Arrays(pixels))


def noisy(count: int, seed: int, size: int = 8) -> ImageSet:
    """Return images of 3 classes: noise with one channel brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 160, (count, size, size, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return image_set(pixels.astype(np.uint8), labels, size)


def numbered(count: int, size: int = 8) -> ImageSet:
    """Return images whose every pixel is different, and says which image it is of."""
    pixels = np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)
    return image_set(np.stack([pixels + index for index in range(count)]), np.arange(count), size)
