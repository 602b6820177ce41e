"""Random crops and flips, each drawn by (seed, epoch, index) and by nothing else."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional

from dop_fast import seeding
from dop_fast.config import SMALL_SIDE
from dop_fast.crops import draw_box
from dop_fast.errors import DataError
from dop_fast.images import ImageSet
from dop_fast.types import Array

ERASED_AREA = 0.02, 0.33
ERASED_RATIO = 0.3, 3.3


def resolve(augment: str, size: int) -> str:
    """Return the augmentation that "auto" means at this size, or the one asked for."""
    if augment != "auto":
        return augment
    return "pad" if size <= SMALL_SIDE else "resized"


def draw_shifts(
    count: int, size: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw for each image how far its crop is shifted, int64[count 2], and whether it is flipped.

    Shifts reach an eighth of the size: 4 pixels at 32.
    """
    rng = seeding.stream(seed, "augment", epoch)
    pad = size // 8
    return rng.integers(-pad, pad + 1, (count, 2)), rng.random(count) < 0.5


def shifted(pixels: Tensor, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Return `pixels[index]`, shifted and flipped; what comes in from outside is reflected.

    `pixels` [n s s 3], `index` int64[k], `shift` int64[k 2] (down, right), `flip` bool[k]; gives
    [k s s 3]. One gather: padding, cropping and flipping are arithmetic on the coordinates.
    """
    size = pixels.shape[1]
    across = torch.arange(size, device=pixels.device)
    rows = across - shift[:, :1]
    columns = torch.where(flip[:, None], across.flip(0), across) - shift[:, 1:]
    rows, columns = _reflected(rows, size), _reflected(columns, size)
    return pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_erasures(count: int, size: int, share: float, seed: int, epoch: int) -> NDArray[np.int64]:
    """Draw the top, left, bottom and right of the box that each image loses, int64[count 4].

    Zhong et al. (2017), as torchvision's RandomErasing draws it: of an area and a ratio of height
    to width in `ERASED_AREA` and `ERASED_RATIO`, smaller than the image in both directions. `share`
    of the images lose one, the boxes of the others are empty.
    """
    rng = seeding.stream(seed, "erase", epoch)
    open_ = rng.random(count) < share
    sides = np.zeros((count, 2), np.int64)
    for _ in range(10):
        area = size**2 * rng.uniform(*ERASED_AREA, count)
        ratio = np.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]), count))
        drawn = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=1).round()
        fits = open_ & (drawn < size).all(axis=1)
        sides[fits] = drawn[fits]
        open_ &= ~fits
        if not open_.any():
            break
    corner = rng.integers(0, size - sides + 1)
    return np.concatenate([corner, corner + sides], axis=1)


def erased(pixels: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Return `pixels` [k s s 3] with `fill` [3] in the box int64[k 4] of each."""
    across = torch.arange(pixels.shape[1], device=pixels.device)
    rows = (across >= box[:, :1]) & (across < box[:, 2:3])
    columns = (across >= box[:, 1:2]) & (across < box[:, 3:])
    return torch.where((rows[:, :, None] & columns[:, None, :])[..., None], fill, pixels)


def _reflected(at: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - at.abs()).abs()


def resized(
    images: ImageSet, seed: int, epoch: int, index: Array
) -> tuple[NDArray[np.uint8], dict[int, DataError]]:
    """Return random resized crops of the images at `index`, flipped or not, uint8[k s s 3].

    And what cannot be read, as `ImageSet.attempt` does.
    """
    out = np.zeros((len(index), images.size, images.size, 3), np.uint8)
    failed: dict[int, DataError] = {}

    def place(row: int) -> None:
        i = int(index[row])
        rng = seeding.stream(seed, "augment", epoch, i)
        try:
            image = images.decode(i)
        except DataError as error:
            failed[row] = error
            return
        box = draw_box(image.height, image.width, rng)
        crop = np.asarray(functional.resized_crop(image, *box, size=[images.size, images.size]))
        out[row] = crop[:, ::-1] if rng.random() < 0.5 else crop

    # as many threads as torch may use: DataLoader's workers are held to one
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(place, range(len(index))))
    return out, failed
