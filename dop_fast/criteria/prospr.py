"""ProsPr: sensitivity of the loss after a few steps of training (Alizadeh et al., 2022).

|d L(theta_K) / dm| at m = 1, where theta_0 = m * theta and theta_K comes of K steps of SGD that
move all parameters: |theta * lambda_0|, lambda_0 the gradient of the last loss by theta_0. It goes
back through the steps without a graph of them, by products of the Hessian at the weights visited:
    nu_k = momentum * nu_(k+1) - lr * lambda_(k+1),    lambda_k = lambda_(k+1) + H_k nu_k
`clean`: every step sees all the material. `published` follows the code: every step sees one chunk,
the next in turn, and beginning anew when they are used up (with new_data=False the first chunk
always, the default of its command line); with momentum, nothing flows through the first step's
gradient, which the code detaches; `kept` rounds up. Not followed: the refusal of an empty layer,
and of layers other than convolutions, linear layers and batch norm.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from dop_fast.engine import Precision, gradients, hessian_products
from dop_fast.models import prunable
from dop_fast.types import Batch, Batches, Loss, Scores

NEEDS_DATA = True
PASSES = 7  # a gradient for each of 3 steps, that at the end, and a product for each step
VARIANTS = ("clean", "published")

Values: TypeAlias = dict[str, Tensor]
"""By parameter name, all parameters."""


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    steps: int = 3,
    lr: float = 0.1,
    momentum: float = 0.0,
    first_order: bool = False,
    new_data: bool = True,
    variant: str = "clean",
    precision: Precision = "exact",
) -> Scores:
    """Return |theta * lambda_0|; `first_order`: with lambda_K for lambda_0. The seed has no effect.

    Holds the parameters of every step. Raises `ModelError` where the steps diverge.
    """
    published = variant == "published"
    copy, theta = _open_norms(deepcopy(model)), _values(model)
    turns = _turns(batches, steps + 1, new_data) if published else [batches] * (steps + 1)
    visited, velocity = [theta], dict.fromkeys(theta, torch.zeros(()))
    for turn in turns[:-1]:
        g = gradients(_at(copy, theta), turn, loss, precision, names=theta)
        velocity = {name: g[name].add_(momentum * v.to(g[name])) for name, v in velocity.items()}
        theta = {name: value - lr * velocity[name] for name, value in theta.items()}
        visited.append(theta)
    adjoint = gradients(_at(copy, visited.pop()), turns.pop(), loss, precision, names=theta)
    nu = {name: torch.zeros_like(value) for name, value in adjoint.items()}
    first = 1 if published and momentum else 0
    for k in reversed(range(steps if first_order else first, steps)):
        nu = {name: momentum * nu[name] - lr * value for name, value in adjoint.items()}
        (bent,) = hessian_products(_at(copy, visited[k]), turns[k], loss, [nu], precision)
        adjoint = {name: value + bent[name] for name, value in adjoint.items()}
    return {
        name: (adjoint[name] * weight.detach()).abs_() for name, weight in prunable(model).items()
    }


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps."""
    return math.ceil(sum(score.numel() for score in scores.values()) * density)


def _values(model: nn.Module) -> Values:
    return {name: value.detach() for name, value in model.named_parameters()}


def _at(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return the model, its parameters set."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return model


def _open_norms(model: nn.Module) -> nn.Module:
    """Return the model, in place, its batch norms in parts that the engine has rules for."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _BatchNorm) and module.affine:
            model.set_submodule(name, _OpenNorm(module))
    return model


class _OpenNorm(nn.Module):
    """Batch norm by the batch's statistics; its scale and shift are operations of their own."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self._eps = norm.weight, norm.bias, norm.eps
        self._forward_hooks.update(norm._forward_hooks)  # that scale a residual branch

    def forward(self, x: Tensor) -> Tensor:
        """Return x [n c ...] normalised."""
        shape = [1, -1, *[1] * (x.dim() - 2)]
        normal = batch_norm(x, None, None, training=True, eps=self._eps)
        return normal * self.weight.view(shape) + self.bias.view(shape)


def _turns(batches: Batches, count: int, new_data: bool) -> list[Batches]:
    """Return the chunk of each step, as batches; all of nothing where there is none."""
    chunks: list[Batch] = list(islice(batches, count if new_data else 1))
    return [chunks[k % len(chunks) :][:1] for k in range(count)] if chunks else [chunks] * count
