"""SGD with a mask in Triton: one launch for all parameters, masked or not."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.lists import addresses, aligned, blocks
from dop_fast.kernels.masked_step.reference import Rule

BLOCK = 4096


def step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
    *,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do as `reference.step_` does to dense float32, all of a parameter in one order.

    Whether a gradient is not finite is read by the kernel: nobody waits for the device.
    """
    columns = (weights, gradients, momenta)
    work = blocks(tuple(weight.numel() for weight in weights), BLOCK, weights[0].device)
    if not len(work):
        return
    scale, found = scaling or (work, work)  # not read where nothing is scaled
    _step[(len(work),)](
        addresses(*columns, masks), work, len(weights), scale, found,
        rule.lr, rule.momentum, rule.weight_decay,
        rule.nesterov, scaling is not None, aligned(*columns), BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit(do_not_specialize=["many", "lr", "momentum", "decay"])
def _step(  # type: ignore[no-untyped-def]
    table, work, many, scale, found, lr, momentum, decay, NESTEROV: tl.constexpr,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = work + 3 * tl.program_id(0)
    tensor, start, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    w = tl.load(table + tensor).to(tl.pointer_type(tl.float32))
    g = tl.load(table + many + tensor).to(tl.pointer_type(tl.float32))
    m = tl.load(table + 2 * many + tensor).to(tl.pointer_type(tl.float32))
    address = tl.load(table + 3 * many + tensor)  # 0: an empty mask
    bits = address.to(tl.pointer_type(tl.uint8)) + start // 8
    if ALIGNED:
        w, g, m = tl.multiple_of(w, 16), tl.multiple_of(g, 16), tl.multiple_of(m, 16)
    start = tl.multiple_of(start, BLOCK)
    share = 1.0
    if SCALED:
        share = 1.0 / tl.load(scale)
        size = tl.where(tl.load(found) != 0, 0, size)
    inside = tl.arange(0, BLOCK)
    w, g, m = w + start + inside, g + start + inside, m + start + inside
    if start + BLOCK <= size:  # without a mask, loads of 16 bytes
        _block(w, g, m, bits, address, None, share, lr, momentum, decay, NESTEROV, BLOCK)
    else:
        exists = start + inside < size
        _block(w, g, m, bits, address, exists, share, lr, momentum, decay, NESTEROV, BLOCK)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    w, g, m, bits, address, exists, share, lr, momentum, decay, NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    weight = tl.load(w, mask=exists)
    slope = tl.load(g, mask=exists) * share + decay * weight
    moved = momentum * tl.load(m, mask=exists) + slope
    weight -= lr * (slope + momentum * moved if NESTEROV else moved)
    if address != 0:
        inside = tl.arange(0, BLOCK)
        byte = tl.load(bits + inside // 8, mask=exists).to(tl.int32)
        kept = ((byte >> (7 - inside % 8)) & 1) != 0
        weight = tl.where(kept, weight, 0.0)
        moved = tl.where(kept, moved, 0.0)
    tl.store(w, weight, mask=exists)
    tl.store(m, moved, mask=exists)
