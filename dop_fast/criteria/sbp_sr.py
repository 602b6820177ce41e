"""SBP-SR: sensitivity, of a network with scaled residual branches (Hayou et al., 2021).

SNIP's |g * theta| of the Stable ResNet, y = x + F(x) / sqrt(L), which is trained so too: `prepare`
makes a model that one, before it is scored and before it is trained. Without it, `score` scales
for the time of scoring.

`published` follows the code of one of the authors (sAviOr287/imagenet_ICLR): batches are cut into
chunks of 20, of which each counts the same, whatever it holds; `kept` keeps one weight too many,
and ties. Its division by the sum of all scores changes no rank and is left out. It draws the
weights, also those that are trained, by a rule of its own (convolutions Kaiming normal over the
fan-out, linear layers N(0, 0.01)); here the model's own stay.
"""

from torch import nn

from dop_fast.criteria._chunks import Cut, alike, flat
from dop_fast.engine import Precision, gradients
from dop_fast.models import prunable
from dop_fast.residual import scale_branches, scaled_branches
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
VARIANTS = ("clean", "published")
CHUNK = 20


def prepare(model: nn.Module) -> nn.Module:
    """Return the model with its residual branches scaled, in place; once is enough.

    Raises `ModelError` where there is no residual block of a known kind.
    """
    return scale_branches(model)


def check(model: nn.Module, sparsity: float) -> None:
    """Raise `ModelError` where there is no residual block of a known kind."""
    with scaled_branches(model):
        pass


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    variant: str = "clean",
    precision: Precision = "exact",
) -> Scores:
    """Return |g * theta| of the scaled network, published times a constant; no effect of seed."""
    if variant == "published":
        batches, loss = Cut(batches, CHUNK), alike(loss)
    with scaled_branches(model):
        g = gradients(model, batches, loss, precision)
    return {name: (g[name] * weight.detach()).abs_() for name, weight in prunable(model).items()}


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of these scores."""
    values = flat(scores)
    removed = int(len(values) * (1 - density))
    if not removed:
        return len(values)
    return int((values >= values.kthvalue(removed).values).sum())
