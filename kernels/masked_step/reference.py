"""SGD with a mask in plain PyTorch, parameter by parameter, of any precision, on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dop_fast.kernels import bits
from dop_fast.kernels.lists import in_place, like


@dataclass(frozen=True)
class Rule:
    """SGD as torch has it: m <- momentum m + g + weight_decay w, then w <- w - lr m.

    With `nesterov`, w <- w - lr (g + weight_decay w + momentum m).
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False


def step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
    *,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Update weights and momenta in place; both are exactly 0 where a bit is 0, whatever g is.

    A mask is `bits.pack`ed in the order of its weight's memory, or empty where everything stays.
    `scaling`: what gradients are multiplied by, and whether one of them is not finite, float32[]
    each; then nothing is updated.
    """
    if scaling is not None and bool(scaling[1]):
        return
    layers = zip(weights, gradients, momenta, masks, strict=True)
    for weight, gradient, momentum, mask in layers:
        w, g, m = in_place(weight), like(gradient, weight), in_place(momentum)
        if scaling is not None:
            g = g / scaling[0]
        g = g + rule.weight_decay * w
        m.mul_(rule.momentum).add_(g)
        w.sub_(rule.lr * (g + rule.momentum * m if rule.nesterov else m))
        if len(mask):
            bits.reference.apply_((w, m), (mask, mask))
