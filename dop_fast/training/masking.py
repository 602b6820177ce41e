"""Pruned weights held at zero through SGD with momentum and weight decay."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dop_fast import masks
from dop_fast.masks import MaskSet


class HeldMask:
    """Applies a mask to a model once, then keeps what it removed at zero.

    A removed weight of zero with a gradient of zero has no decay and gathers no momentum, so
    that masking the gradients before each step is all it takes.
    """

    def __init__(self, model: nn.Module, mask_set: MaskSet | None) -> None:
        self._weights: dict[str, nn.Parameter] = {}
        self._keep: list[Tensor] = []
        if mask_set is None:
            return
        masks.apply_(model, mask_set)
        parameters = dict(model.named_parameters())
        self._weights = {name: parameters[name] for name in mask_set.masks}
        self._keep = [
            # the weight's type and memory layout: one fused product for all layers
            torch.empty_like(weight, requires_grad=False).copy_(mask_set.masks[name])
            for name, weight in self._weights.items()
        ]

    def mask_gradients(self) -> None:
        """Zero the gradients of removed weights, in place; call it before each step."""
        weights = zip(self._weights.values(), self._keep, strict=True)
        pairs = [(weight.grad, keep) for weight, keep in weights if weight.grad is not None]
        if pairs:
            gradients, keeps = zip(*pairs, strict=True)
            torch._foreach_mul_(gradients, keeps)

    def check(self, momentum: Mapping[str, Tensor]) -> None:
        """Assert that all removed weights, and their momentum, are exactly zero."""
        for (name, weight), keep in zip(self._weights.items(), self._keep, strict=True):
            for value in (weight.detach(), momentum.get(name, keep.new_zeros(()))):
                assert not bool((value * (1 - keep)).any()), f"a removed weight of {name} moved"
