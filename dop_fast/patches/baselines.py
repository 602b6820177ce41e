"""What the paper holds its patches against (section 4.2): what a class has without concepts."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dop_fast.images import ImageSet
from dop_fast.patches.dop import refuse_if_fewer
from dop_fast.seeding import stream
from dop_fast.types import ClassConcepts


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


def all_ones(count: int, size: int, device: torch.device) -> Tensor:
    """Return the all-one matrices, float32[count 3 size size]: ones after normalisation.

    So in the authors' code. Ones are no image: their pixels lie above the mean by one standard
    deviation. With balanced labels and equal inputs the gradients nearly cancel, so that this
    control says little about what is discriminative.
    """
    ones = torch.ones(count, 3, size, size, device=device)
    return ones.contiguous(memory_format=torch.channels_last)
