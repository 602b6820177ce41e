"""Scores in Triton: one launch for all layers."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.lists import addresses, aligned, blocks
from dop_fast.kernels.score.reference import Rule

BLOCK = 4096


def score_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    rule: Rule,
    masks: Sequence[Tensor] | None = None,
) -> None:
    """Do as `reference.score_` does to contiguous float32[n]."""
    # operands that are not there are not read: the weights stand in
    columns = (out, weights, factors or weights)
    work = blocks(tuple(map(len, out)), BLOCK, out[0].device)
    _score[(len(work),)](
        addresses(*columns, masks or weights), work, len(out), rule.scale,
        factors is not None, masks is not None, rule.absolute, rule.add, aligned(*columns), BLOCK,
        num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["many", "scale"])
def _score(  # type: ignore[no-untyped-def]
    table, work, many, scale, FACTOR: tl.constexpr, MASK: tl.constexpr,
    ABSOLUTE: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = work + 3 * tl.program_id(0)
    tensor, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    out = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    theta = tl.load(table + many + tensor).to(tl.pointer_type(tl.float32))
    factor = tl.load(table + 2 * many + tensor).to(tl.pointer_type(tl.float32))
    bits = tl.load(table + 3 * many + tensor).to(tl.pointer_type(tl.uint8)) + start // 8
    if ALIGNED:
        out = tl.multiple_of(out, 16)
        theta = tl.multiple_of(theta, 16)
        factor = tl.multiple_of(factor, 16)
    start = tl.multiple_of(start, BLOCK)
    inside = tl.arange(0, BLOCK)
    out, theta, factor = out + start + inside, theta + start + inside, factor + start + inside
    bits += inside // 8
    if start + BLOCK <= size:  # without a mask, loads of 16 bytes
        _block(out, theta, factor, bits, scale, None, FACTOR, MASK, ABSOLUTE, ADD, BLOCK)
    else:
        exists = start + inside < size
        _block(out, theta, factor, bits, scale, exists, FACTOR, MASK, ABSOLUTE, ADD, BLOCK)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    out, theta, factor, bits, scale, exists, FACTOR: tl.constexpr, MASK: tl.constexpr,
    ABSOLUTE: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value = tl.load(theta, mask=exists)
    if FACTOR:
        value *= tl.load(factor, mask=exists)
    if ABSOLUTE:
        value = tl.abs(value)
    value *= scale
    if MASK:
        bit = tl.load(bits, mask=exists).to(tl.int32) >> (7 - tl.arange(0, BLOCK) % 8)
        value = tl.where((bit & 1) != 0, value, 0.0)
    if ADD:
        value += tl.load(out, mask=exists)
    tl.store(out, value, mask=exists)
