"""Random with ERK densities: layers keep in proportion to sum(shape) / prod(shape).

Erdos-Renyi-Kernel (Evci et al., 2020): a layer whose share would exceed 1 is dense, and the others
share what remains. `clean` keeps exactly its count in each layer. `published` (Liu et al., 2022)
draws every weight by itself, so that the layers' counts vary, and the overall one, which is then
what `kept` says.
"""

import math

from torch import Tensor, nn

from dop_fast.criteria._lots import lots
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False
VARIANTS = ("clean", "published")


def score(
    model: nn.Module, batches: Batches, loss: Loss, seed: int, *, variant: str = "clean"
) -> Scores:
    """Return sum(shape) / prod(shape) over a lot; batches and loss have no effect."""
    drawn = lots(model, seed, "random-erk", independent=variant == "published")
    return {name: _claim(u) / u for name, u in drawn}


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of its draws, score > 1 / epsilon.

    With epsilon such that the layers' densities, min(1, epsilon * claim), have the mean `density`.
    """
    left = sorted(scores.values(), key=_claim)
    goal = density * sum(score.numel() for score in left)
    epsilon = 0.0
    while left:
        epsilon = goal / sum(_claim(score) * score.numel() for score in left)
        if epsilon * _claim(left[-1]) <= 1:
            break
        goal -= left.pop().numel()
    return sum(int((score * epsilon >= 1).sum()) for score in scores.values())


def _claim(weight: Tensor) -> float:
    return sum(weight.shape) / math.prod(weight.shape)
