"""A derivative times its weight, which most scores are: all layers in one pass."""

from torch import Tensor, nn

from dop_fast.kernels.score import Rule, score_
from dop_fast.models import prunable
from dop_fast.types import Scores


def weighed(model: nn.Module, slopes: dict[str, Tensor], *, absolute: bool) -> Scores:
    """Return theta times its slope, or its absolute value, in the memory of `slopes`."""
    weights = prunable(model)
    out = [slopes[name] for name in weights]
    score_(out, [weight.detach() for weight in weights.values()], out, Rule(absolute))
    return dict(zip(weights, out, strict=True))
