"""Random resized crops (Szegedy et al., 2015), drawn by a NumPy generator."""

import math

import numpy as np

AREA = 0.08, 1.0
RATIO = 3 / 4, 4 / 3


def draw_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop's top, left, height and width as RandomResizedCrop (Szegedy et al., 2015) does.

    Its area is a share in `AREA` of the image, its width over height lies in `RATIO`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    h = min(height, round(width / RATIO[0]))  # too long an image: the largest box in its middle
    w = min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w
