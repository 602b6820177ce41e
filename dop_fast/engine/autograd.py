"""The whole chunk by PyTorch's autograd: for a forward that a tape cannot follow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from dop_fast.engine.tape import Slope

_LEAVES = Lock()


class ByAutograd:
    """What a `Recording` offers, by double backward."""

    def __init__(self, run: Callable[[], Tensor], weights: Mapping[str, Tensor]) -> None:
        self._run, self._weights = run, weights

    def gradient(self, *, keep: bool) -> dict[str, Slope]:
        return self._derive(None)

    def products(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Slope]]:
        return [self._derive(vector) for vector in vectors]

    def saved_bytes(self) -> int:
        return 0

    def _derive(self, vector: Mapping[str, Tensor] | None) -> dict[str, Slope]:
        weights = list(self._weights.values())
        with _requiring_grad(weights):
            slopes = torch.autograd.grad(
                self._run(), weights, create_graph=vector is not None, materialize_grads=True
            )
            if vector is not None:
                z = [
                    (vector[name] * g).sum() for name, g in zip(self._weights, slopes, strict=True)
                ]
                slopes = torch.autograd.grad(torch.stack(z).sum(), weights, materialize_grads=True)
        return dict(zip(self._weights, slopes, strict=True))


@contextmanager
def _requiring_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Make them leaves, which chunks share, for one thread at a time."""
    with _LEAVES:
        for weight in weights:
            weight.requires_grad_()
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)
