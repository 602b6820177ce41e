"""SBP-SR: sensitivity, of a network with scaled residual branches (Hayou et al., 2021).

SNIP's |g * theta| of the Stable ResNet, y = x + F(x) / sqrt(L), which is trained so too: `prepare`
makes a model that one, before it is scored and before it is trained. Without it, `score` scales
for the time of scoring. `clean` weighs images alike. `published` follows the code: every chunk
has the same weight, whatever it holds (its chunks hold 20 images, the last of a batch the rest).
Not followed: it keeps one weight too many, and draws weights by a rule of its own (convolutions
Kaiming normal over the fan-out, linear layers N(0, 0.01)); here the model's own stay.
"""

from torch import Tensor, nn

from dop_fast.engine import Precision, gradients
from dop_fast.models import prunable
from dop_fast.residual import scale_branches, scaled_branches
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
VARIANTS = ("clean", "published")


def prepare(model: nn.Module) -> nn.Module:
    """Return the model with its residual branches scaled, in place; once is enough.

    Raises `ModelError` where there is no residual block of a known kind.
    """
    return scale_branches(model)


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    variant: str = "clean",
    precision: Precision = "exact",
) -> Scores:
    """Return |g * theta| of the scaled network, published up to a factor; no effect of the seed."""

    def by_chunk(logits: Tensor, labels: Tensor) -> Tensor:
        # the engine counts a chunk by its size: what remains is the sum of the chunks' means
        return loss(logits, labels) / len(labels)

    with scaled_branches(model):
        g = gradients(model, batches, by_chunk if variant == "published" else loss, precision)
    return {name: (g[name] * weight.detach()).abs_() for name, weight in prunable(model).items()}
