"""SLIC superpixels: images to connected segments of like colour, several sizes at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dop_fast.errors import ConfigError
from dop_fast.kernels.slic import cpu, reference

__all__ = ["reference", "slic"]


def slic(
    images: NDArray[np.uint8],
    n_segments: Sequence[int],
    *,
    compactness: float = 20.0,
    sigma: float = 1.0,
    iterations: int = 10,
    coarse: bool = False,
) -> NDArray[np.int32]:
    """Segment `images` uint8[n h w 3] (RGB) at each of r resolutions: labels int32[n r h w].

    In each image and resolution the labels are 0..k-1, each one 4-connected segment of at least a
    quarter of the mean area asked for; k is within max(5 %, 1) of `n_segments`, at most the number
    of pixels. `compactness` weighs place against CIELAB colour, `sigma` blurs the colours (pixels),
    `coarse` runs the first 7 of 10 iterations at half resolution. Images run in parallel on
    `torch.get_num_threads()` threads and do not influence each other.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ConfigError(f"SLIC needs uint8[n h w 3], not {images.dtype}{list(images.shape)}")
    if 0 in images.shape[1:]:
        raise ConfigError("SLIC needs images of at least one pixel")
    if min(n_segments, default=1) < 1 or iterations < 1:
        raise ConfigError("n_segments and iterations must be at least 1")
    if not 0 < compactness <= 8192 or not 0 <= sigma <= 64:
        raise ConfigError("compactness must be in (0, 8192] and sigma in [0, 64]")
    counts = tuple(int(n) for n in n_segments)
    return cpu.slic(images, counts, compactness, sigma, iterations, coarse)
