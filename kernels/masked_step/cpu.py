"""SGD with a mask in Numba: one pass over all operands."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from dop_fast.kernels.lists import Piece, pieces, spread
from dop_fast.kernels.masked_step.reference import Rule
from dop_fast.types import Array

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


def step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do as `reference.step_` does to dense float32, all of a parameter in one order."""
    if scaling is not None and bool(scaling[1]):
        return
    flat = [_flat(weight) for weight in weights]
    gradient, momentum = ([_flat(x).numpy() for x in column] for column in (gradients, momenta))
    bits = [mask.numpy() if len(mask) else None for mask in masks]
    share = 1.0 if scaling is None else 1.0 / float(scaling[0])
    factors = tuple(map(np.float32, (share, rule.lr, rule.momentum, rule.weight_decay)))

    def job(part: Sequence[Piece]) -> None:
        for i, start, weight in part:
            span = slice(start, start + len(weight))
            mask = bits[i]
            _step(
                weight.numpy(), gradient[i][span], momentum[i][span],
                None if mask is None else mask[start // 8 :], factors, rule.nesterov,
            )  # fmt: skip

    spread(job, list(pieces(flat)))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


# Numba compiles `None` apart from an array, and drops what it does not reach
@_compiled
def _step(
    w: Array, g: Array, m: Array, bits: Any, factors: tuple[Any, Any, Any, Any], nesterov: bool
) -> None:
    if bits is None:
        for i in range(len(w)):
            w[i], m[i] = _moved(w[i], g[i], m[i], factors, nesterov)
        return
    nought = np.float32(0)
    whole = len(w) // 8
    for b in range(whole):
        byte = bits[b]
        for j in range(8):
            i = 8 * b + j
            weight, momentum = _moved(w[i], g[i], m[i], factors, nesterov)
            kept = byte & np.uint8(128 >> j)
            w[i] = weight if kept else nought
            m[i] = momentum if kept else nought
    for i in range(8 * whole, len(w)):
        weight, momentum = _moved(w[i], g[i], m[i], factors, nesterov)
        kept = bits[whole] & np.uint8(128 >> (i & 7))
        w[i] = weight if kept else nought
        m[i] = momentum if kept else nought


@_compiled
def _moved(w: Any, g: Any, m: Any, factors: tuple[Any, Any, Any, Any], nesterov: bool) -> Any:
    share, lr, momentum, decay = factors
    g = g * share + decay * w
    m = momentum * m + g
    return w - lr * (g + momentum * m if nesterov else m), m
