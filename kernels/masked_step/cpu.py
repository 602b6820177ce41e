"""SGD with a mask in Numba: one pass over all operands. Without a mask torch's is as fast."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dop_fast.kernels.lists import Piece, pieces, spread
from dop_fast.kernels.masked_step.reference import Rule
from dop_fast.types import Array

_compiled: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})

CHUNK = 4096  # weights: what belongs to them stays in the first cache
BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)).view(np.uint64)
"""Eight bits as eight bytes: a loop over bytes is a loop of vectors, one over bits is not."""


def step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
) -> None:
    """Do as `reference.step_` does to dense float32, all of a parameter in one order."""
    layers = list(zip(weights, gradients, momenta, masks, strict=True))
    whole = [layer[:3] for layer in layers if not len(layer[3])]
    if whole:
        w, g, m = map(list, zip(*whole, strict=True))
        torch._fused_sgd_(
            w, g, m, weight_decay=rule.weight_decay, momentum=rule.momentum, lr=rule.lr,
            dampening=0, nesterov=rule.nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip
    masked = [layer for layer in layers if len(layer[3])]
    flat = [[_flat(value) for value in layer[:3]] for layer in masked]
    bits = [layer[3].numpy() for layer in masked]
    # what the update takes of the slope and of the running sum
    part = (1.0, rule.momentum) if rule.nesterov else (0.0, 1.0)
    rates = tuple(map(np.float32, (rule.lr, rule.momentum, rule.weight_decay, *part)))

    def job(share: Sequence[Piece]) -> None:
        for i, start, weight in share:
            span = slice(start, start + len(weight))
            slope, momentum = (value[span].numpy() for value in flat[i][1:])
            _step(weight.numpy(), slope, momentum, bits[i][start // 8 :], rates)

    spread(job, list(pieces([layer[0] for layer in flat])))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@_compiled
def _step(w: Array, g: Array, m: Array, bits: Array, rates: Any) -> None:
    kept = np.empty(CHUNK, np.uint8)
    eights = kept.view(np.uint64)
    for start in range(0, len(w), CHUNK):
        end = min(len(w), start + CHUNK)
        for b in range((end - start + 7) // 8):
            eights[b] = BYTES[bits[start // 8 + b]]
        _chunk(w[start:end], g[start:end], m[start:end], kept, rates)


@_compiled
def _chunk(w: Array, g: Array, m: Array, kept: Array, rates: Any) -> None:
    lr, momentum, decay, of_slope, of_sum = rates
    for i in range(len(w)):
        slope = g[i] + decay * w[i]
        running = momentum * m[i] + slope
        weight = w[i] - lr * (of_slope * slope + of_sum * running)
        keep = kept[i] != 0
        w[i] = weight if keep else np.float32(0)
        m[i] = running if keep else np.float32(0)
