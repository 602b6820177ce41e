"""Iterative SNIP: SNIP in rounds, each without the weights already removed (de Jorge et al., 2021).

`published` differs as in FORCE, whose code it shares.
"""

from torch import Tensor, nn

from dop_fast.criteria import force
from dop_fast.criteria._networks import masked
from dop_fast.engine import Precision
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
ROUNDS = force.ROUNDS
VARIANTS = force.VARIANTS
kept = force.kept


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
    """Return |theta * g| of the masked network, of which removed weights have none."""
    network = masked(model, mask)
    return force.score(network, batches, loss, seed, precision=precision, variant=variant)
