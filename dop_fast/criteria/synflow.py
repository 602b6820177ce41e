"""SynFlow: keep the weights on the strongest paths, without data (Tanaka et al., 2020).

A weight's score is its share of R, the sum of the outputs of the network of |theta| for an input
of ones: theta * dR/dtheta / R. In float64, which reaches 10^308: R is 10^220 for a ResNet-152 of
1000 classes, 10^34 for a VGG-19. Batch norm uses its running statistics. Layers that would hide
what flows are taken as linear: norms of a single sample by their scale and shift, clipping and
tanh, which all that is large runs into, as the identity.

`published` follows the authors' code (ganguli-lab/Synaptic-Flow): in the weights' own type, which
overflows from a ResNet-50 on; R itself, not shares of it; and every layer but batch norm as it is.
`kept` rounds what goes down and drops ties with the last. The code's default is one round; the
paper's, and this, are 100.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from dop_fast import masks
from dop_fast.criteria._chunks import flat
from dop_fast.criteria._networks import LINEAR, RUNNING, Replaced
from dop_fast.engine import gradients
from dop_fast.errors import DataError, ModelError
from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False
ROUNDS = 100
VARIANTS = ("clean", "published")


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    variant: str = "clean",
    mask: dict[str, Tensor] | None = None,
    image: tuple[int, ...] = (),
) -> Scores:
    """Return |theta| dR/dtheta; loss and seed have no effect.

    `image`: channels, height and width of an input; empty: those of the first batch. Raises
    `DataError` where there is neither, `ModelError` where R overflows.
    """
    clean = variant == "clean"
    positive = _absolute(model, double=clean)
    if mask is not None:
        masks.apply_(positive, MaskSet(mask))
    weights = prunable(positive)
    like = next(iter(weights.values()), torch.empty(()))
    ones = like.detach().new_ones(1, *(image or _image(batches)))
    batch = ones, torch.zeros(1, dtype=torch.int64)
    network = Replaced(positive, LINEAR if clean else RUNNING)
    try:
        slopes = Replaced.own(gradients(network, [batch], _log_total if clean else _total))
    except ModelError as error:
        if clean or "finite" not in error.message:
            raise
        raise ModelError(
            f"SynFlow as published overflows {like.dtype}: {error.message}",
            "its shares in float64 do not: --variant clean",
        ) from error
    return {
        name: (slopes[name] * weights[name].detach()).to(weight.dtype)
        for name, weight in prunable(model).items()
    }


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of these scores."""
    values = flat(scores)
    removed = int((1 - density) * len(values))
    if not removed:
        return len(values)
    return int((values > values.kthvalue(removed).values).sum())


def _absolute(model: nn.Module, *, double: bool) -> nn.Module:
    copy = deepcopy(model)
    if double:
        copy = copy.double()
    with torch.no_grad():
        for value in (*copy.parameters(), *copy.buffers()):
            if value.is_floating_point():
                value.abs_()
    return copy


def _image(batches: Batches) -> tuple[int, ...]:
    for images, _ in batches:
        return tuple(images.shape[1:])
    raise DataError("SynFlow has to know the size of an input", "give image=(3, 224, 224)")


def _total(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.sum()


def _log_total(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return log R, whose slopes are those of R divided by R, and 0 where nothing arrives."""
    total = outputs.sum()
    return (total + (total == 0)).log()
