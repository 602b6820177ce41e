"""Derivatives of the mean loss by the prunable weights, by PyTorch's autograd.

Both are of the mean over all samples: a chunk's mean counts by the chunk's size. (The published
GraSP code gives every chunk the same weight, so images of a short last chunk count for more.)
Batch norm takes its statistics over a chunk; everything else is in evaluation mode, so that
dropout is off and both passes of a Hessian product see one function.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from dop_fast.errors import DataError, ModelError
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss

_PRECISION = tuple(
    attrgetter(path)(torch.backends)
    for path in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
)


def gradients(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return g, the gradient of the mean loss, for each prunable weight in its shape.

    Raises `ModelError` where it is not finite, `DataError` where there is no sample.
    """
    with _scoring(model, loss) as (weights, chunk_loss):

        def slopes(images: Tensor, labels: Tensor) -> Sequence[Tensor]:
            return _derive(chunk_loss(images, labels), weights)

        return _finite(_mean(slopes, weights, batches), "the gradient")


def hessian_gradient(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return Hg, the Hessian of the mean loss times its gradient, exact, by double backward.

    H and g are those of the prunable weights alone. Goes through the batches twice. Raises as
    `gradients`.
    """
    g = gradients(model, batches, loss)
    with _scoring(model, loss) as (weights, chunk_loss):

        def products(images: Tensor, labels: Tensor) -> Sequence[Tensor]:
            slopes = _derive(chunk_loss(images, labels), weights, create_graph=True)
            z = [(g[name] * slope).sum() for name, slope in zip(weights, slopes, strict=True)]
            return _derive(torch.stack(z).sum(), weights)

        return _finite(_mean(products, weights, batches), "the Hessian's product with the gradient")


def _derive(
    value: Tensor, weights: dict[str, Tensor], *, create_graph: bool = False
) -> Sequence[Tensor]:
    # a layer that the forward does not use has derivative zero, not none
    return torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )


def _mean(
    derive: Callable[[Tensor, Tensor], Sequence[Tensor]],
    weights: dict[str, Tensor],
    batches: Batches,
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(iter(sums.values())).device
    count = 0
    for images, labels in batches:
        parts = derive(images.to(device), labels.to(device))
        for total, part in zip(sums.values(), parts, strict=True):
            total.add_(part, alpha=len(labels))
        count += len(labels)
    if not count:
        raise DataError(
            "the batches hold no samples to score weights on",
            "give at least one, in a list: a generator is empty when gone through again",
        )
    return {name: total.div_(count) for name, total in sums.items()}


def _finite(values: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    wrong = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if wrong:
        raise ModelError(
            f"{what} is not finite in {len(wrong)} of {len(values)} layers, first in {wrong[0]}",
            "check that images are normalised and that the weights are those of a fresh model",
        )
    return values


@contextmanager
def _scoring(model: nn.Module, loss: Loss) -> Iterator[tuple[dict[str, Tensor], Loss]]:
    """Offer the prunable weights as leaves, and a chunk's loss as their function.

    The model keeps its weights, gradients, buffers and, after the context, its modes.
    """
    weights = {name: weight.detach().requires_grad_() for name, weight in prunable(model).items()}
    if not weights:
        raise ModelError(
            "the model has no prunable weights", "it needs a convolution or a linear layer"
        )
    others = {name: value.detach() for name, value in model.named_parameters()}

    def chunk_loss(images: Tensor, labels: Tensor) -> Tensor:
        # copies: batch norm must not move the running statistics of the model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        state = {**others, **weights, **buffers}
        return loss(functional_call(model, state, (images,)), labels)

    modes = {module: module.training for module in model.modules()}
    device = next(iter(weights.values())).device
    try:
        for module in modes:
            module.training = isinstance(module, _BatchNorm)
        with (
            _full_precision(),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),  # fused attention has no second derivative
            torch.enable_grad(),
        ):
            yield weights, chunk_loss
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: it changes what GraSP keeps of a ResNet-50, at 95 % to a Jaccard of .45."""
    found = [switch.fp32_precision for switch in _PRECISION]
    try:
        for switch in _PRECISION:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(_PRECISION, found, strict=True):
            switch.fp32_precision = precision
