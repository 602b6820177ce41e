"""Derivatives by float64 double backward, to compare the engine with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from dop_fast.models import prunable

Batches = Sequence[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


def double_backward(
    model: nn.Module, batches: Batches, vectors: Sequence[Weights] | None = None
) -> tuple[Weights, list[Weights]]:
    """Return g and, for each vector (or for g), Hv of the mean loss; dropout is off."""
    model.eval()
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    weights = {name: w.detach().requires_grad_() for name, w in prunable(model).items()}
    others = {name: value.detach() for name, value in model.named_parameters()}
    count = sum(len(labels) for _, labels in batches)

    def loss() -> Tensor:
        parts = []
        for images, labels in batches:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = functional_call(model, {**others, **weights, **buffers}, (images,))
            parts.append(cross_entropy(logits, labels) * len(labels) / count)
        return torch.stack(parts).sum()

    leaves = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(loss(), leaves, create_graph=True, materialize_grads=True)
        slopes = {name: x.detach() for name, x in zip(weights, g, strict=True)}
        products = []
        for vector in [slopes] if vectors is None else vectors:
            z = sum((vector[name] * x).sum() for name, x in zip(weights, g, strict=True))
            hv = torch.autograd.grad(z, leaves, retain_graph=True, materialize_grads=True)
            products.append(dict(zip(weights, hv, strict=True)))
    return slopes, products


def off(found: Weights, exact: Weights) -> float:
    """Return the largest error of a layer, relative to the layer's norm."""
    assert found.keys() == exact.keys()
    return max(
        float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-30))
        for name in exact
    )


def data(count: int, side: int, classes: int, dtype: torch.dtype = torch.float64) -> Batches:
    drawn = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=drawn, dtype=torch.float64).to(dtype)
    return [(images, torch.randint(classes, (count,), generator=drawn))]


def spread(model: nn.Module) -> nn.Module:
    """Draw the parameters of norms and the biases, which are ones and zeros in a fresh model."""
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.copy_(0.5 + 0.3 * torch.randn(value.shape, generator=drawn))
    return model.double()
