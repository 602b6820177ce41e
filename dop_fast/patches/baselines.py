"""What patches are held against: what a class has without concepts (section 4.2), and controls.

The controls take one thing away each: the image (grey, noise), its detail (blurred), or the
order of importance (reversed, in `dop` and `stitching`).
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dop_fast.images import ImageSet
from dop_fast.patches.dop import refuse_if_fewer
from dop_fast.seeding import stream
from dop_fast.types import Array, ClassConcepts

BLUR = 1 / 20
"""Standard deviation of the blur, as a share of the side: 11 pixels of 224."""


def random_segments(found: ClassConcepts, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` of all segments of a class, in a concept or not; int64[count]."""
    refuse_if_fewer(len(found.segments), count, f"segments of class {found.class_id}")
    rng = stream(seed, "random-segments", found.class_id)
    return rng.permutation(len(found.segments))[:count]


def random_images(images: ImageSet, class_id: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` images of a class, int64[count]."""
    own = images.of_class(class_id)
    refuse_if_fewer(len(own), count, f"images of class {images.classes[class_id]}")
    return stream(seed, "images", class_id).permutation(own)[:count]


def any_images(images: ImageSet, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` of all images, as many of a class as it happens; int64[count]."""
    refuse_if_fewer(len(images), count, "images")
    return stream(seed, "images-random").permutation(len(images))[:count]


def blurred(pixels: Array, valid: Array, fill: int) -> NDArray[np.uint8]:
    """Return patches without their detail: shape, place and broad colours stay; uint8[n h w 3].

    The mean is over the patch's own pixels, so that the fill does not bleed in.
    """
    out = np.full_like(pixels, fill)
    sigma = BLUR * pixels.shape[1]
    for row, (image, own) in enumerate(zip(pixels, valid, strict=True)):
        weight = own.astype(np.float32)
        summed, count = (
            cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
            for plane in (image * weight[..., None], weight)
        )
        out[row][own] = np.rint(summed[own] / count[own, None])
    return out


def all_ones(count: int, size: int, device: torch.device) -> Tensor:
    """Return the all-one matrices, float32[count 3 size size]: ones after normalisation.

    So in the authors' code. Ones are no image: their pixels lie above the mean by one standard
    deviation. With balanced labels and equal inputs the gradients nearly cancel, so that this
    control says little about what is discriminative.
    """
    ones = torch.ones(count, 3, size, size, device=device)
    return ones.contiguous(memory_format=torch.channels_last)


def noise(items: Array, size: int, seed: int, device: torch.device) -> Tensor:
    """Return a standard normal image for each item, after normalisation: float32[k 3 size size].

    Each pixel has the mean and the deviation of the data, and no neighbour that it depends on.
    """
    shape = (3, size, size)
    drawn = [stream(seed, "noise", int(item)).standard_normal(shape, np.float32) for item in items]
    return torch.from_numpy(np.stack(drawn)).to(device, memory_format=torch.channels_last)
