"""How published codes cut, weigh and count: chunks of equal weight, and thresholds with ties."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dop_fast.types import Batch, Batches, Loss, Scores


@dataclass(frozen=True)
class Cut:
    """Batches cut into chunks of `size` samples; what is left over of each is a shorter one."""

    batches: Batches
    size: int

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in self.batches:
            for start in range(0, len(labels), self.size):
                part = slice(start, start + self.size)
                yield images[part], labels[part]


def halves_by_class(batches: Batches) -> list[Batch]:
    """Return all samples in two chunks, in the order of their classes: each has half of them."""
    parts = list(batches)
    if not parts:
        return []
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    order = labels.argsort(stable=True)
    middle = len(order) // 2
    chosen = [half for half in (order[:middle], order[middle:]) if len(half)]
    return [(images[half.to(images.device)], labels[half]) for half in chosen]


def alike(loss: Loss) -> Loss:
    """Return a loss with which every chunk counts the same, whatever its size.

    The engine's mean over samples is then that over chunks, times a positive constant.
    """

    def share(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits, labels) / len(labels)

    return share


def flat(scores: Scores) -> Tensor:
    """Return all scores as one, [n]."""
    return torch.cat([score.flatten() for score in scores.values()])
