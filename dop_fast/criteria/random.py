"""Random: keep weights by lot, the floor for every criterion.

Uniform over all weights, so every layer keeps about the same share. Each layer draws from its own
stream, on the CPU: the same scores on every device, whatever other layers there are.
"""

import torch
from torch import nn

from dop_fast.models import prunable
from dop_fast.seeding import derive
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False


def score(model: nn.Module, batches: Batches, loss: Loss, seed: int) -> Scores:
    """Return scores uniform in [0, 1); batches and loss have no effect."""
    scores = {}
    for name, weight in prunable(model).items():
        generator = torch.Generator().manual_seed(derive(seed, "random", name))
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float32)
        scores[name] = drawn.to(weight.device)
    return scores
