"""Passes over all scores in Triton, one launch each for all layers."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.lists import addresses, aligned, blocks

BLOCK, COUNTED = 4096, 8192
"""Elements of a program; and of a step of the one that counts into a histogram of its own."""
LOW = 20
WAVES = 4
"""Histograms to a multiprocessor: enough to hide the reads, few to add up."""


class Passes:
    """What `select.top` asks of float32 tensors; those that are not contiguous are copied.

    Counts are of 32 bits: 2^31 scores at most.
    """

    low = LOW

    def __init__(self, scores: Sequence[Tensor]) -> None:
        self._scores = [score.contiguous().view(-1) for score in scores]
        self._device = scores[0].device
        self._sizes = tuple(map(len, self._scores))
        self._table, self._aligned = addresses(self._scores), aligned(self._scores)
        self._work = blocks(self._sizes, BLOCK, self._device)

    def first(self) -> Tensor:
        """Count all scores by the high bits of their keys, int32[2^12]."""
        counts = self._zeros(1 << 32 - LOW)
        work = blocks(self._sizes, COUNTED, self._device)
        processors = (
            torch.cuda.get_device_properties(self._device).multi_processor_count
            if self._device.type == "cuda"
            else 1
        )
        grid = (min(len(work), WAVES * processors),)
        _first[grid](self._table, work, len(work), counts, self._aligned, LOW, COUNTED, num_warps=8)
        return counts

    def second(self, high: int) -> Tensor:
        """Count those of one such bin by the low bits, int32[2^20]."""
        counts = self._zeros(1 << LOW)
        _second[(len(self._work),)](
            self._table, self._work, high, counts, self._aligned, LOW, BLOCK, num_warps=8
        )
        return counts

    def equal(self, threshold: float) -> Tensor:
        """Count the scores equal to the threshold in each block, int32[blocks]."""
        counts = self._zeros(len(self._work))
        _equal[(len(self._work),)](
            self._table, self._work, self._single(threshold), counts, self._aligned, BLOCK,
            num_warps=8,
        )  # fmt: skip
        return counts

    def start(self, piece: int) -> tuple[int, int]:
        """Return the tensor of a block, and its first element's index there."""
        tensor, start, _ = self._work[piece].tolist()
        return tensor, start

    def masks(self, threshold: float, cuts: Sequence[int]) -> list[Tensor]:
        """Keep what is above the threshold and, up to its tensor's cut, what is equal to it."""
        device = self._device
        bits = [torch.empty((n + 7) // 8, dtype=torch.uint8, device=device) for n in self._sizes]
        table = addresses(self._scores, bits)
        _mask[(len(self._work),)](
            table, self._work, len(bits), self._single(threshold),
            torch.tensor(cuts, device=device), self._aligned, BLOCK // 8, num_warps=8,
        )  # fmt: skip
        return bits

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)

    def _single(self, threshold: float) -> Tensor:
        # as an argument Triton would take 1.0 or an infinity for something else than a float32
        return torch.tensor([threshold], dtype=torch.float32, device=self._device)


@triton.jit
def _key(value):  # type: ignore[no-untyped-def]
    """Return the int32 that orders as the float32 does; -0.0 is 0.0."""
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    table, entry, inside, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return a block's scores, and which of them exist."""
    scores = tl.load(table + tl.load(entry)).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        scores = tl.multiple_of(scores, 16)
    start, size = tl.multiple_of(tl.load(entry + 1), BLOCK), tl.load(entry + 2)
    exists = start + inside < size
    if start + BLOCK <= size:  # without a mask, loads of 16 bytes
        value = tl.load(scores + start + inside)
    else:
        value = tl.load(scores + start + inside, mask=exists, other=0.0)
    return value, exists


@triton.jit(do_not_specialize=["many"])
def _first(  # type: ignore[no-untyped-def]
    table, work, many, counts,
    ALIGNED: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BINS: tl.constexpr = 1 << (32 - LOW)
    inside = tl.arange(0, BLOCK)
    found = tl.zeros((BINS,), tl.int32)
    for block in range(tl.program_id(0), many, tl.num_programs(0)):
        value, exists = _load(table, work + 3 * block, inside, ALIGNED, BLOCK)
        found += tl.histogram((_key(value) >> LOW) + BINS // 2, BINS, mask=exists)
    tl.atomic_add(counts + tl.arange(0, BINS), found, mask=found > 0)


@triton.jit(do_not_specialize=["high"])
def _second(  # type: ignore[no-untyped-def]
    table, work, high, counts,
    ALIGNED: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value, exists = _load(table, work + 3 * tl.program_id(0), tl.arange(0, BLOCK), ALIGNED, BLOCK)
    key = _key(value)
    exists &= (key >> LOW) + (1 << (31 - LOW)) == high
    low = tl.where(exists, key & ((1 << LOW) - 1), -1)
    # of a bin's many addresses equal scores all add to one: the largest of a block do so together
    largest = tl.max(low)
    tl.atomic_add(counts + largest, tl.sum((low == largest).to(tl.int32)), mask=largest >= 0)
    tl.atomic_add(counts + low, 1, mask=exists & (low != largest))


@triton.jit
def _equal(  # type: ignore[no-untyped-def]
    table, work, threshold, counts, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    value, exists = _load(table, work + 3 * block, tl.arange(0, BLOCK), ALIGNED, BLOCK)
    same = exists & (_key(value) == _key(tl.load(threshold)))
    tl.store(counts + block, tl.sum(same.to(tl.int32)))


@triton.jit(do_not_specialize=["many"])
def _mask(  # type: ignore[no-untyped-def]
    table, work, many, threshold, cuts,
    ALIGNED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    entry = work + 3 * tl.program_id(0)
    place, bit = tl.arange(0, BYTES)[:, None], tl.arange(0, 8)[None, :]
    value, exists = _load(table, entry, 8 * place + bit, ALIGNED, 8 * BYTES)
    key, least = _key(value), _key(tl.load(threshold))
    tensor, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first = start + 8 * place + bit < tl.load(cuts + tensor)
    kept = exists & ((key > least) | ((key == least) & first))
    bits = tl.load(table + many + tensor).to(tl.pointer_type(tl.uint8))
    byte = start // 8 + tl.arange(0, BYTES)
    packed = tl.sum(kept.to(tl.int32) << (7 - bit), axis=1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte < (size + 7) // 8)
