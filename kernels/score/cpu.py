"""Scores in Numba: one pass over all operands."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from dop_fast.kernels.lists import Piece, pieces, spread
from dop_fast.kernels.score.reference import Rule
from dop_fast.types import Array

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")


def score_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    rule: Rule,
    masks: Sequence[Tensor] | None = None,
) -> None:
    """Do as `reference.score_` does to contiguous float32[n]."""
    theta = [weight.numpy() for weight in weights]
    factor = None if factors is None else [part.numpy() for part in factors]
    bits = None if masks is None else [part.numpy() for part in masks]
    scale = np.float32(rule.scale)

    def job(share: Sequence[Piece]) -> None:
        for i, start, part in share:
            span = slice(start, start + len(part))
            _score(
                part.numpy(),
                theta[i][span],
                None if factor is None else factor[i][span],
                None if bits is None else bits[i][start // 8 :],
                (rule.absolute, rule.add, scale),
            )

    spread(job, list(pieces(out)))


# Numba compiles `None` apart from an array, and drops what it does not reach
@_compiled
def _score(
    out: Array, theta: Array, factor: Any, bits: Any, rule: tuple[bool, bool, np.float32]
) -> None:
    add = rule[1]
    if bits is None:
        for i in range(len(out)):
            value = _value(theta, factor, rule, i)
            out[i] = out[i] + value if add else value
        return
    whole = len(out) // 8
    for b in range(whole):
        byte = bits[b]
        for j in range(8):
            i = 8 * b + j
            value = _value(theta, factor, rule, i)
            value = value if byte & np.uint8(128 >> j) else np.float32(0)
            out[i] = out[i] + value if add else value
    for i in range(8 * whole, len(out)):
        value = _value(theta, factor, rule, i)
        value = value if bits[whole] & np.uint8(128 >> (i & 7)) else np.float32(0)
        out[i] = out[i] + value if add else value


@_compiled
def _value(theta: Array, factor: Any, rule: tuple[bool, bool, np.float32], i: int) -> Any:
    absolute, _, scale = rule
    value = theta[i]
    if factor is not None:
        value *= factor[i]
    return scale * (abs(value) if absolute else value)
