"""Packed masks on weights in Triton: one launch for all layers."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.lists import addresses, aligned, blocks

BLOCK = 4096


def apply_(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Do as `reference.apply_` does to contiguous float32[n]."""
    work = blocks(tuple(map(len, weights)), BLOCK, weights[0].device)
    _apply[(len(work),)](
        addresses(weights, packed), work, len(weights), aligned(weights), BLOCK, num_warps=8
    )


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    table, work, many, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    entry = work + 3 * tl.program_id(0)
    tensor, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    weight = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    bits = tl.load(table + many + tensor).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    inside = tl.arange(0, BLOCK)
    exists = start + inside < size
    byte = tl.load(bits + start // 8 + inside // 8, mask=exists, other=255)
    removed = ((byte.to(tl.int32) >> (7 - inside % 8)) & 1) == 0
    tl.store(weight + start + inside, tl.zeros((BLOCK,), tl.float32), mask=exists & removed)
