"""Random with ERK densities: layers keep in proportion to sum(shape) / prod(shape).

Erdos-Renyi-Kernel (Evci et al., 2020): a layer whose share would exceed 1 is dense, and the others
share what remains. `clean` keeps exactly its count in each layer. `published` (Liu et al., 2022)
draws every weight by itself, so that the layers' counts vary; there the overall count varies too,
here it is exact.
"""

import math

from torch import nn

from dop_fast.criteria._lots import lots
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False
VARIANTS = ("clean", "published")


def score(
    model: nn.Module, batches: Batches, loss: Loss, seed: int, *, variant: str = "clean"
) -> Scores:
    """Return sum(shape) / prod(shape) over a lot; batches and loss have no effect."""
    return {
        name: sum(u.shape) / math.prod(u.shape) / u
        for name, u in lots(model, seed, "random-erk", independent=variant == "published")
    }
