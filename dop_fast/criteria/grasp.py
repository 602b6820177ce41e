"""GraSP: keep the weights that carry the gradient flow (Wang et al., 2020), Eq. 4.

Sign: Eq. 4 reads s = -theta * (Hg) and the text keeps the largest s. The published code removes
the largest -theta * Hg, which is what preserves the gradient's norm, so the score here, higher =
keep, is +theta * Hg. The published code also draws the linear layers anew in the copy that it
scores, counts images of a short last chunk for more, and keeps one weight too many; this does not.
"""

from torch import Tensor, nn

from dop_fast.engine import Precision, hessian_gradient
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    temperature: float = 200.0,
    precision: Precision = "exact",
) -> Scores:
    """Return theta * Hg of the loss of logits / temperature; the seed has no effect."""

    def tempered(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits / temperature, labels)

    hg = hessian_gradient(model, batches, tempered, precision)
    return {name: hg[name] * weight.detach() for name, weight in prunable(model).items()}
