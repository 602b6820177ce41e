"""Stand-ins for a network: masked, drawn anew, with other norms. The network itself stays."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dop_fast import masks
from dop_fast.masks import MaskSet
from dop_fast.seeding import derive


def masked(model: nn.Module, mask: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a copy whose removed weights are zero; the model itself where there is no mask."""
    if mask is None:
        return model
    copy = deepcopy(model)
    masks.apply_(copy, MaskSet(dict(mask)))
    return copy


def redrawn(
    model: nn.Module, names: Iterable[str], draw: Callable[[Tensor, Generator], object], seed: int
) -> nn.Module:
    """Return a copy in which `draw` filled the parameters of these names, each from its stream.

    Drawn on the CPU: the same on every device.
    """
    copy = deepcopy(model)
    parameters = dict(copy.named_parameters())
    with torch.no_grad():
        for name in names:
            drawn = torch.empty(parameters[name].shape)
            draw(drawn, torch.Generator().manual_seed(derive(seed, "redrawn", name)))
            parameters[name].copy_(drawn)
    return copy


class Replaced(nn.Module):
    """A network that calls other functions in place of some of PyTorch's."""

    def __init__(self, network: nn.Module, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.network, self._functions = network, functions

    def forward(self, images: Tensor) -> Any:
        """Return the network's result."""
        with _Replacing(self._functions):
            return self.network(images)

    @staticmethod
    def own(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is named by this module's parameters by the network's own names."""
        return {name.removeprefix("network."): value for name, value in named.items()}


class _Replacing(TorchFunctionMode):
    def __init__(self, functions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self._functions.get(func, func)(*args, **(kwargs or {}))


def _running_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if running_mean is None or running_var is None:
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _layer_affine(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    scaled = input if weight is None else input * weight
    return scaled if bias is None else scaled + bias


def _group_affine(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    shape = (-1, *(1,) * (input.dim() - 2))
    weight, bias = (None if part is None else part.view(shape) for part in (weight, bias))
    return _layer_affine(input, None, weight, bias)


def _instance_affine(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, *rest: Any, **named: Any,
) -> Tensor:  # fmt: skip
    return _group_affine(input, 1, weight, bias)


def _unbent(input: Tensor, *rest: Any, **named: Any) -> Tensor:
    return input


RUNNING = {F.batch_norm: _running_norm}
"""Batch norm by its running statistics, where it has any."""
LINEAR: dict[Any, Callable[..., Any]] = {
    **RUNNING,
    F.layer_norm: _layer_affine,
    F.rms_norm: _layer_affine,
    F.group_norm: _group_affine,
    F.instance_norm: _instance_affine,
    **dict.fromkeys((F.hardtanh, F.relu6, torch.tanh, Tensor.tanh), _unbent),
}
"""As `RUNNING`; other norms by their scale and shift alone, as batch norm is before training;
and what saturates let through, all of it, as a ReLU does where signals are positive."""
