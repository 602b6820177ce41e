"""Scores of all layers at once: every operand is read once, nothing is kept in between."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dop_fast.kernels import bits
from dop_fast.kernels.lists import in_place, like
from dop_fast.kernels.score import cpu, reference
from dop_fast.kernels.score.reference import Rule

__all__ = ["Rule", "reference", "score_"]


def score_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    rule: Rule,
    masks: Sequence[Tensor] | None = None,
) -> None:
    """Write rule(theta * factor) to `out`, or add it, for each layer's tensors of one shape.

    `out` is dense, best in the weight's memory layout: an operand in another is copied first.
    `masks` are `bits.pack`ed; a removed weight scores 0 whatever it is. Not float32: no faster
    than `reference.score_`.
    """
    columns = [out, weights] if factors is None else [out, weights, factors]
    for layer in zip(*columns, strict=True):
        if any(part.shape != layer[0].shape or part.device != out[0].device for part in layer):
            raise ValueError(f"a layer's {[(*x.shape, x.device.type) for x in layer]} differ")
    if masks is not None:
        bits.check(out, masks)
    if any(part.dtype != torch.float32 for column in columns for part in column):
        reference.score_(out, weights, factors, rule, masks)
        return
    some = [index for index, score in enumerate(out) if score.numel()]
    if not some:
        return
    scores = [in_place(out[i]) for i in some]
    theta = [like(weights[i], out[i]) for i in some]
    others = None if factors is None else [like(factors[i], out[i]) for i in some]
    kept = None if masks is None else [bits.in_memory_order(masks[i], out[i]) for i in some]
    if out[0].is_cuda:
        from dop_fast.kernels.score import gpu

        gpu.score_(scores, theta, others, rule, kept)
    else:
        cpu.score_(scores, theta, others, rule, kept)
