"""What 2:4 sparsity gains where a GPU multiplies by it: PyTorch's semi-structured tensors."""

import torch
from torch import nn

from dop_fast.masks import MaskSet, has_fours

ROWS = 4096
"""Of the matrix that each layer is timed on."""
SIDES = 32, 64
"""Outputs and inputs that float16 kernels take multiples of."""


def available() -> bool:
    """Return whether there is a GPU with sparse tensor cores, Ampere or later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def speedups(model: nn.Module, mask_set: MaskSet) -> dict[str, float]:
    """Return by linear layer how many times as fast its float16 product is with 2:4 sparsity.

    Layers whose mask is not 2:4, or whose sides are no multiples of SIDES, are left out, and so
    are convolutions, for which PyTorch has no such product. Needs `available()`.
    """
    found = {}
    for name, module in model.named_modules():
        mask = mask_set.masks.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or mask is None or not _fits(mask):
            continue
        weight = (module.weight.detach() * mask.to(module.weight.device)).cuda().half()
        found[name] = _seconds(weight) / _seconds(torch.sparse.to_sparse_semi_structured(weight))
    return found


def _fits(mask: torch.Tensor) -> bool:
    sides = zip(mask.shape, SIDES, strict=True)
    if not has_fours(mask) or any(side % least for side, least in sides):
        return False
    return bool((mask.view(len(mask), -1, 4).sum(2) <= 2).all())


def _seconds(weight: torch.Tensor) -> float:
    from torch.utils.benchmark import Timer  # warns of a missing GPU when it is imported

    rows = torch.randn(ROWS, weight.shape[1], device="cuda", dtype=torch.float16)
    timer = Timer(
        "linear(rows, weight)",
        globals={"linear": nn.functional.linear, "rows": rows, "weight": weight},
    )
    return float(timer.blocked_autorange().median)
