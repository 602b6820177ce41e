"""A step of SGD that leaves removed weights and their momentum at zero, all parameters at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dop_fast.kernels import bits
from dop_fast.kernels.masked_step import cpu, reference
from dop_fast.kernels.masked_step.reference import Rule

__all__ = ["Rule", "reference", "step_"]


def step_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
    *,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Do as `reference.step_` says, reading and writing everything once; gradients stay.

    A momentum lies in memory as its weight does; a gradient that does not is copied first. Not
    float32, or not dense in one of PyTorch's formats, or scaled on a CPU: by the reference.
    """
    masked = [pair for pair in zip(weights, masks, strict=True) if len(pair[1])]
    if masked:
        bits.check(*zip(*masked, strict=True))
    for weight, gradient, momentum in zip(weights, gradients, momenta, strict=True):
        if not weight.shape == gradient.shape == momentum.shape:
            raise ValueError(f"{list(gradient.shape)} is no gradient of {list(weight.shape)}")
        if weight.stride() != momentum.stride():
            raise ValueError("a momentum has to lie in memory as its weight does")
    columns = (weights, gradients, momenta)
    on_gpu = bool(weights) and weights[0].is_cuda
    single = all(x.dtype == torch.float32 for column in columns for x in column)
    if not single or not all(map(_dense, weights)) or (scaling is not None and not on_gpu):
        reference.step_(weights, gradients, momenta, masks, rule, scaling=scaling)
        return
    gradients = [_like(g, w) for g, w in zip(gradients, weights, strict=True)]
    if on_gpu:
        from dop_fast.kernels.masked_step import gpu

        gpu.step_(weights, gradients, momenta, masks, rule, scaling=scaling)
    else:
        cpu.step_(weights, gradients, momenta, masks, rule)


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _like(gradient: Tensor, weight: Tensor) -> Tensor:
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight, requires_grad=False).copy_(gradient)
