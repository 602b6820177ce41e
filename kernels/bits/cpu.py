"""Packed masks on weights in Numba: neither unpacked masks nor a product."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from dop_fast.kernels.lists import Piece, pieces, spread
from dop_fast.types import Array

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")


def apply_(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Do as `reference.apply_` does to contiguous float32[n]."""
    bits = [part.numpy() for part in packed]

    def job(share: Sequence[Piece]) -> None:
        for tensor, start, part in share:
            _apply(part.numpy(), bits[tensor][start // 8 :])

    spread(job, list(pieces(weights)))


@_compiled
def _apply(weight: Array, bits: Array) -> None:
    whole = len(weight) // 8
    for b in range(whole):
        byte = bits[b]
        for j in range(8):
            kept = byte & np.uint8(128 >> j)
            weight[8 * b + j] = weight[8 * b + j] if kept else np.float32(0)
    for i in range(8 * whole, len(weight)):
        if not bits[whole] & np.uint8(128 >> (i & 7)):
            weight[i] = 0
