"""Magnitude: keep the largest weights (Han et al., 2015; at initialisation: Frankle et al., 2021).

As published, but at initialisation and over all layers at once.
"""

from torch import nn

from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False


def score(model: nn.Module, batches: Batches, loss: Loss, seed: int) -> Scores:
    """Return |theta|; batches, loss and seed have no effect."""
    return {name: weight.detach().abs() for name, weight in prunable(model).items()}
