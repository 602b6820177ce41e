"""Pruned weights held at zero through SGD with momentum and weight decay."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dop_fast import masks
from dop_fast.kernels import bits, masked_step
from dop_fast.masks import MaskSet


class MaskedSGD(torch.optim.SGD):
    """SGD that leaves removed weights, and their momentum, at exactly zero.

    Whatever their gradient is: not a number does not leak. The masks, packed in the order of the
    weights' memory, belong to the parameter group, and so to its state dict and deepcopies.
    `torch.amp.GradScaler` leaves unscaling to the step.
    """

    # GradScaler looks for the first, and for its own steps alone sets the others
    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def __init__(self, model: nn.Module, mask_set: MaskSet | None, **settings: Any) -> None:
        """Set what `mask_set` removes to zero; `settings` as for SGD."""
        super().__init__(model.parameters(), **settings)
        if mask_set is not None:
            masks.apply_(model, mask_set)
        kept = {} if mask_set is None else mask_set.masks
        self.param_groups[0]["masks"] = [
            _packed(weight, kept.get(name)) for name, weight in model.named_parameters()
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        (group,) = self.param_groups
        rule = masked_step.Rule(
            group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]
        )
        pairs = zip(group["params"], group["masks"], strict=True)
        moving = [(weight, mask) for weight, mask in pairs if weight.grad is not None]
        masked_step.step_(
            [weight.detach() for weight, _ in moving],
            [weight.grad for weight, _ in moving],
            [self._momentum(weight) for weight, _ in moving],
            [mask for _, mask in moving],
            rule,
            scaling=self._scaling(),
        )

    def _scaling(self) -> tuple[Tensor, Tensor] | None:
        return (self.grad_scale, self.found_inf) if hasattr(self, "grad_scale") else None

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, requires_grad=False)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def _packed(weight: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.empty(0, dtype=torch.uint8, device=weight.device)
    return bits.in_memory_order(bits.pack(keep), weight).to(weight.device)


def check(mask_set: MaskSet | None, *states: Mapping[str, Tensor]) -> None:
    """Assert that what a mask removes is exactly zero in each state, by parameter name."""
    for name, keep in (mask_set.masks if mask_set else {}).items():
        for state in states:
            if name in state:
                removed = state[name].detach().cpu()[~keep]
                assert not bool(removed.any()), f"a removed weight of {name} moved"
