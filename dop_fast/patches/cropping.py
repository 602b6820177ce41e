"""Random crops of what a network is scored on: as published, or with patch pixels guaranteed."""

from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dop_fast.crops import draw_box
from dop_fast.seeding import stream
from dop_fast.types import Array

Augment: TypeAlias = str
"""none. published: RandomResizedCrop and a flip, as in training. guaranteed: of those, the first
crop that keeps `SHARE` of the patch's own pixels."""

SHARE = 0.5
TRIES = 50


def crop(
    pixels: Array, valid: Array | None, items: Array, augment: Augment, seed: int
) -> NDArray[np.uint8]:
    """Return a crop of each image, resized to its size, flipped or not, uint8[k h w 3].

    Drawn by the seed and the item, int[k], and by nothing else. `valid` bool[k h w]: the pixels
    of the patch; None: all.
    """
    if augment == "none":
        return pixels
    out, (height, width) = np.empty_like(pixels), pixels.shape[1:3]
    whole = np.ones((height, width), np.bool_)
    for row, item in enumerate(items):
        rng = stream(seed, "crop", int(item))
        own = whole if valid is None else valid[row]
        top, left, high, wide = choose_box(own, augment, rng)
        part = Image.fromarray(pixels[row, top : top + high, left : left + wide])
        resized = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))
        out[row] = resized[:, ::-1] if rng.random() < 0.5 else resized
    return out


def choose_box(
    valid: Array, augment: Augment, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop's top, left, height and width in a patch, `valid` bool[h w] being its pixels.

    Where `TRIES` crops in a row keep too little, it is the whole image.
    """
    height, width = valid.shape
    if augment == "published":
        return draw_box(height, width, rng)
    sums = cv2.integral(valid.view(np.uint8))  # of all pixels above and to the left
    for _ in range(TRIES):
        top, left, high, wide = box = draw_box(height, width, rng)
        bottom, right = top + high, left + wide
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        if inside >= SHARE * sums[-1, -1]:
            return box
    return 0, 0, height, width
