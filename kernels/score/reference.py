"""Scores in plain PyTorch, layer after layer, of any precision, on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dop_fast.kernels import bits


@dataclass(frozen=True)
class Rule:
    """A score is `scale` * theta * factor, or its absolute value; `add` adds it to what is there.

    SNIP is |theta g|; GraSP theta Hg and SynFlow theta g with their signs; magnitude |theta|,
    without a factor. Chunks and processes are added up, each with its share as the scale.
    """

    absolute: bool
    add: bool = False
    scale: float = 1.0


def score_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    rule: Rule,
    masks: Sequence[Tensor] | None = None,
) -> None:
    """Write the scores to `out`; those of weights whose bit in `masks` is 0 count as 0."""
    for index, (score, weight) in enumerate(zip(out, weights, strict=True)):
        value = weight.detach() if factors is None else weight.detach() * factors[index]
        if rule.absolute:
            value = value.abs()
        if masks is not None:
            value = value.masked_fill(~bits.unpack(masks[index], weight.shape), 0)
        if rule.add:
            score.add_(value, alpha=rule.scale)
        else:
            score.copy_(value * rule.scale)
