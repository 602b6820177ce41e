"""Masks held in any training loop, by any optimizer."""

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dop_fast import masks
from dop_fast.kernels import bits
from dop_fast.masks import MaskSet


def hold(model: nn.Module, mask_set: MaskSet, optimizer: Optimizer) -> RemovableHandle:
    """Apply a mask and hold it at every step of the optimizer, until the handle's `remove()`.

    For a model on its device, and a fresh optimizer that leaves a weight of zero without
    gradient at zero, as SGD, Adam and AdamW do.
    """
    masks.apply_(model, mask_set)
    parameters = dict(model.named_parameters())
    held = [
        (parameters[name], bits.pack(mask).to(parameters[name].device))
        for name, mask in mask_set.masks.items()
    ]

    def mask_gradients(*arguments: object) -> None:
        pairs = [(weight.grad, kept) for weight, kept in held if weight.grad is not None]
        bits.apply_([gradient for gradient, _ in pairs], [kept for _, kept in pairs])

    return optimizer.register_step_pre_hook(mask_gradients)
