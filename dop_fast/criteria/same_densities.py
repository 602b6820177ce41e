"""The layers' densities of another mask, the places in them by lot: a control for any criterion.

Where it trains as well as the mask it is like, that mask's choice of weights within the layers
adds nothing to its choice of densities (Su et al., 2020; Frankle et al., 2021).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dop_fast.errors import ConfigError
from dop_fast.models import prunable
from dop_fast.seeding import derive
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    like: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Return above 1 for as many weights of each layer as `like` keeps, else below, by lot.

    At the sparsity of `like` these are what is kept. Raises `ConfigError` without it.
    """
    if like is None:
        raise ConfigError("same-densities needs a mask to be like", "add --like MASK")
    scores = {}
    for name, weight in prunable(model).items():
        generator = torch.Generator().manual_seed(derive(seed, "same-densities", name))
        lot = torch.rand(weight.numel(), generator=generator)
        kept = int(like[name].sum())
        lot[lot.argsort(descending=True)[:kept]] += 1
        scores[name] = lot.view(weight.shape).to(weight.device)
    return scores
