"""The exact k best of any number of scores, without a sort and without joining them.

Scores are ranked by the bits of a float32, which order as the numbers do. One pass counts them
by their highest bits, a second counts those of the k-th score's bin by the others, which makes
the k-th score known; the third writes the mask. Only where some but not all of the scores equal
to the k-th stay does another pass find out up to where.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dop_fast.kernels.select import cpu, reference
from dop_fast.kernels.select.reference import UnorderedError

__all__ = ["UnorderedError", "reference", "top"]


class _Passes(Protocol):
    """What reads all scores, on one kind of device."""

    low: int
    """Bits of a score that the second pass counts by; the first does by the 32 - low others."""

    def first(self) -> Tensor: ...

    def second(self, high: int) -> Tensor: ...

    def equal(self, threshold: float) -> Tensor: ...

    def start(self, piece: int) -> tuple[int, int]: ...

    def masks(self, threshold: float, cuts: Sequence[int]) -> list[Tensor]: ...


def top(scores: Sequence[Tensor], k: int, *, finite: bool = False) -> list[Tensor]:
    """Return where the k largest scores are, `bits.pack`ed, a mask a tensor, on their device.

    Of equal scores the first stay: earlier in the list, then in the flattened tensor; 0.0 and
    -0.0 are equal. Raises `UnorderedError` for NaN and, if `finite`, for infinities. float64 is
    ranked by `reference.top`. Tensors on a GPU that are not contiguous are copied.
    """
    total = sum(score.numel() for score in scores)
    if not 1 <= k <= total:
        raise ValueError(f"{k} of {total} scores cannot be kept")
    if any(score.dtype == torch.float64 for score in scores):
        _check(scores, finite)
        return reference.top(scores, k)
    singles = [score.detach().float() for score in scores]
    passes = _passes(singles)
    counts = passes.first()
    # of a float32 all exponent bits are set: the outer 1/512 of the bins at both ends
    edge = len(counts) // 512
    if int(counts[:edge].sum() + counts[-edge:].sum()):
        _check(singles, finite)
    high, rank, _ = _locate(counts, k)
    low, rank, equal = _locate(passes.second(high), rank)
    threshold = _float((high - (1 << 31 - passes.low) << passes.low) | low)
    return passes.masks(threshold, _cuts(passes, singles, threshold, rank, equal))


def _passes(scores: Sequence[Tensor]) -> _Passes:
    if scores[0].is_cuda:
        from dop_fast.kernels.select import gpu

        return gpu.Passes(scores)
    return cpu.Passes(scores)


def _check(scores: Sequence[Tensor], finite: bool) -> None:
    for layer, score in enumerate(scores):
        if bool((~score.isfinite() if finite else score.isnan()).any()):
            raise UnorderedError(layer)


def _locate(counts: Tensor, rank: int) -> tuple[int, int, int]:
    """Return the bin of the `rank`-th from the top, its rank in there, and the bin's count."""
    upto = counts.cumsum_(0)  # in place: a GPU's counts are no small part of few scores
    last = int(upto[-1])
    at = int(torch.searchsorted(upto, last - rank, right=True))
    before = int(upto[at - 1]) if at else 0
    return at, rank - last + int(upto[at]), int(upto[at]) - before


def _float(key: int) -> float:
    """Return the float32 of an order-preserving key, int32."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return float(np.int32(bits).view(np.float32))


def _cuts(
    passes: _Passes, scores: Sequence[Tensor], threshold: float, stay: int, equal: int
) -> list[int]:
    """Return up to which element of each tensor those equal to the threshold stay."""
    sizes = [score.numel() for score in scores]
    if stay == equal:
        return sizes
    counts = passes.equal(threshold)
    upto = counts.cumsum(0)
    at = int(torch.searchsorted(upto, stay))
    stay -= int(upto[at] - counts[at])
    tensor, start = passes.start(at)
    places = (scores[tensor].reshape(-1)[start:] == threshold).nonzero()
    return [*sizes[:tensor], start + int(places[stay - 1]) + 1, *(0 for _ in sizes[tensor + 1 :])]
