"""SNIP: keep the weights whose removal changes the loss the most (Lee et al., 2019), Eq. 3.

The published code divides by the sum of all scores, which changes no rank; scores biases too; lets
batch norm use its running statistics; and trains another draw of the weights than it scored. Here
batch norm uses the chunk's statistics, and the weights scored are those that are trained.
"""

from torch import nn

from dop_fast.engine import Precision, gradients
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    precision: Precision = "exact",
) -> Scores:
    """Return |g * theta|, Eq. 3; the seed has no effect."""
    g = gradients(model, batches, loss, precision)
    return {name: (g[name] * weight.detach()).abs_() for name, weight in prunable(model).items()}
