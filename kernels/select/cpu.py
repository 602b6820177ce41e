"""Passes over all scores in Numba, each by as many threads as Numba may use."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dop_fast.kernels.lists import Piece, pieces, spread
from dop_fast.types import Array

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")
LOW, REST, ONE = np.uint32(16), np.uint32(0xFFFF), np.uint32(1)
BINS, HALF = 1 << 16, 1 << 15  # as many counts of 4 bytes stay in a core's second cache


class Passes:
    """What `select.top` asks of float32 tensors of any memory layout."""

    low = int(LOW)

    def __init__(self, scores: Sequence[Tensor]) -> None:
        self._sizes = [score.numel() for score in scores]
        self._work = list(pieces(scores))

    def first(self) -> Tensor:
        """Count all scores by the high bits of their keys, int64[2^16]."""
        counts = self._counts(_first)
        # counting by the bits as they are, and turning the bins into order here, is faster
        return torch.cat([counts[HALF:].flip(0), counts[:HALF]])

    def second(self, high: int) -> Tensor:
        """Count those of one such bin by the low bits, int64[2^16]."""
        bits = np.uint32(high - HALF if high >= HALF else BINS - 1 - high)
        counts = self._counts(lambda values, into: _second(values, into, bits))
        return counts if high >= HALF else counts.flip(0)

    def equal(self, threshold: float) -> Tensor:
        """Count the scores equal to the threshold in each piece, int64[pieces]."""
        counts = np.empty(len(self._work), np.int64)
        shares = spread(
            lambda share: [_equal(_flat(piece), np.float32(threshold)) for piece in share],
            self._work,
        )
        for first, share in enumerate(shares):
            counts[first :: len(shares)] = share
        return torch.from_numpy(counts)

    def start(self, piece: int) -> tuple[int, int]:
        """Return the tensor of a piece, and its first element's index there."""
        return self._work[piece][:2]

    def masks(self, threshold: float, cuts: Sequence[int]) -> list[Tensor]:
        """Keep what is above the threshold and, up to its tensor's cut, what is equal to it."""
        bits = [np.empty((size + 7) // 8, np.uint8) for size in self._sizes]

        def job(share: Sequence[Piece]) -> None:
            for piece in share:
                cut = np.int64(cuts[piece.tensor] - piece.start)
                into = bits[piece.tensor][piece.start // 8 :]
                _mask(_flat(piece), np.float32(threshold), cut, into)

        spread(job, self._work)
        return [torch.from_numpy(part) for part in bits]

    def _counts(self, count: Callable[[Array, Array], None]) -> Tensor:
        def job(share: Sequence[Piece]) -> Array:
            counts = np.zeros(BINS, np.uint32)
            for piece in share:
                count(_flat(piece), counts)
            return counts

        return torch.from_numpy(np.sum(spread(job, self._work), axis=0, dtype=np.int64))


def _flat(piece: Piece) -> Array:
    return np.asarray(piece.part.reshape(-1).numpy())


@_compiled
def _bits(value: Any) -> Any:
    """Return the bits of a float32, of -0.0 those of 0.0."""
    return np.float32(value + np.float32(0)).view(np.uint32)


@_compiled
def _first(values: Array, counts: Array) -> None:
    for value in values:
        counts[np.uint64(_bits(value) >> LOW)] += ONE


@_compiled
def _second(values: Array, counts: Array, high: int) -> None:
    for value in values:
        bits = _bits(value)
        if bits >> LOW == high:
            counts[np.uint64(bits & REST)] += ONE


@_compiled
def _equal(values: Array, threshold: float) -> int:
    count = 0
    for value in values:
        count += value == threshold
    return count


@_compiled
def _mask(values: Array, threshold: float, cut: int, bits: Array) -> None:
    whole = len(values) // 8
    for b in range(whole):
        byte = np.uint8(0)
        for j in range(8):
            value = values[8 * b + j]
            if value > threshold or (value == threshold and 8 * b + j < cut):
                byte |= np.uint8(128 >> j)
        bits[b] = byte
    if 8 * whole < len(values):
        bits[whole] = 0
    for i in range(8 * whole, len(values)):
        if values[i] > threshold or (values[i] == threshold and i < cut):
            bits[whole] |= np.uint8(128 >> (i & 7))
