"""SNIP: keep the weights whose removal changes the loss the most (Lee et al., 2019), Eq. 3.

`published` follows the authors' TensorFlow code (namhoonlee/snip-public) where it differs: batch
norm uses its running statistics, and the network that is scored is not the one that is trained but
another draw of its weights and biases (variance scaling: a normal cut at two deviations, its
variance 1 / fan-in). It rounds and breaks ties as this does. Two differences stay: it divides by
the sum of all scores, which changes no rank, and it prunes biases too, for which masks here have
no place.
"""

import math

from torch import Generator, Tensor, nn

from dop_fast.criteria._networks import RUNNING, Replaced, masked, redrawn
from dop_fast.engine import Precision, gradients
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
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
    """Return |g * theta|, Eq. 3; the seed has no effect but on the draw of `published`."""
    if variant == "clean":
        network = masked(model, mask)
        g = gradients(network, batches, loss, precision)
    else:
        network = masked(redrawn(model, _drawn_names(model), _variance_scaling, seed), mask)
        g = Replaced.own(gradients(Replaced(network, RUNNING), batches, loss, precision))
    return {name: (g[name] * weight.detach()).abs_() for name, weight in prunable(network).items()}


def _drawn_names(model: nn.Module) -> list[str]:
    """Return the names of prunable weights and of the biases beside them."""
    weights = prunable(model)
    beside = {name.removesuffix("weight") + "bias" for name in weights}
    return [name for name, _ in model.named_parameters() if name in weights or name in beside]


def _variance_scaling(drawn: Tensor, generator: Generator) -> None:
    fan_in = drawn[0].numel() if drawn.dim() > 1 else len(drawn)
    # cutting a normal at two deviations leaves .8796 of its deviation
    deviation = math.sqrt(1 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(drawn, 0, deviation, -2 * deviation, 2 * deviation, generator)
