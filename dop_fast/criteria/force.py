"""FORCE: prune in rounds, and let weights come back (de Jorge et al., 2021).

A round scores all weights by the gradient at the network without those that the round before
removed, times the weights as they were initialised. The authors' code takes 10 rounds by default;
their results, and this, 60.

`published` follows the authors' code (naver/force): its loss takes raw logits for log
probabilities, so that what is scored is the mean logit of the right class, and not the loss of
training; each chunk counts the same; and `kept` rounds down, then keeps ties with the last. The
code draws other batches in every round; here each sees the same ones, which are the material.
"""

from torch import Tensor, nn
from torch.nn.functional import nll_loss

from dop_fast.criteria._chunks import alike, flat
from dop_fast.criteria._networks import masked
from dop_fast.engine import Precision, gradients
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
ROUNDS = 60
REVIVES = True
VARIANTS = ("clean", "published")


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    precision: Precision = "exact",
    variant: str = "clean",
    mask: dict[str, Tensor] | None = None,
) -> Scores:
    """Return |theta * g|, g at the masked network; the seed has no effect.

    `published` does not use the loss.
    """
    used = loss if variant == "clean" else alike(nll_loss)
    g = gradients(masked(model, mask), batches, used, precision)
    return {name: (g[name] * weight.detach()).abs_() for name, weight in prunable(model).items()}


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of these scores."""
    values = flat(scores)
    count = max(1, int(len(values) * density))
    return int((values >= values.kthvalue(len(values) - count + 1).values).sum())
