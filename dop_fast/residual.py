"""Stable ResNet (Hayou et al., 2021): every residual branch is divided by the root of their number.

y = x + F(x) / sqrt(L), where L counts the residual blocks of the whole network. The division sits
behind the last batch norm of each branch, as in the published code, and changes no name and no
shape: weights and masks fit both networks. It is not part of the state dict, so whoever loads
weights of a scaled network scales it again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from dop_fast.cifar import Block
from dop_fast.errors import ModelError

_LAST: dict[type[nn.Module], str] = {Block: "bn2", BasicBlock: "bn2", Bottleneck: "bn3"}


class _Divide:
    """A forward hook: divides what a module returns by a constant."""

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output / self.divisor


def branch_ends(model: nn.Module) -> list[nn.Module]:
    """Return the last module of each residual branch; none where no kind of block is known."""
    return [
        getattr(module, last)
        for module in model.modules()
        for kind, last in _LAST.items()
        if isinstance(module, kind)
    ]


def scale_branches(model: nn.Module) -> nn.Module:
    """Divide every residual branch by sqrt(L) for good, in place; a scaled network stays so.

    Raises `ModelError` where there is no residual block of a known kind.
    """
    _scale(model)
    return model


@contextmanager
def scaled_branches(model: nn.Module) -> Iterator[None]:
    """Scale as `scale_branches` for a while; a network that is scaled already stays so."""
    hooks = _scale(model)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _scale(model: nn.Module) -> list[Any]:
    ends = branch_ends(model)
    if not ends:
        kinds = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in _LAST)
        raise ModelError(
            "the network has no residual branches for SBP-SR to scale",
            f"use a ResNet, made of {kinds}, or another criterion",
        )
    divide = _Divide(math.sqrt(len(ends)))
    return [end.register_forward_hook(divide) for end in ends if not _is_scaled(end)]


def _is_scaled(end: nn.Module) -> bool:
    return any(isinstance(hook, _Divide) for hook in end._forward_hooks.values())
