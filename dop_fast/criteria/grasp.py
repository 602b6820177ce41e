"""GraSP: keep the weights that carry the gradient flow (Wang et al., 2020), Eq. 4.

Sign: Eq. 4 reads s = -theta * (Hg) and the text keeps the largest s. The published code removes
the largest -theta * Hg, which is what preserves the gradient's norm, so the score here, higher =
keep, is +theta * Hg.

`published` follows the authors' code (alecwangcq/GraSP). It has two paths that differ; images of
up to 64 pixels take the one for CIFAR and Tiny-ImageNet, larger ones that for ImageNet:
    CIFAR     all samples in two halves in the order of the classes, so that batch norm sees half
              of the classes at a time; all linear layers drawn anew (Xavier) in the scored copy
    ImageNet  chunks of 20; only the last linear layer drawn anew
In both each chunk counts the same, so that images of a short one count for more, and it keeps all
weights down to and with the one that `kept` finds: one too many, and ties. Its division by the
sum of all scores changes no rank and is left out.
"""

from torch import Generator, Tensor, nn

from dop_fast.config import SMALL_SIDE
from dop_fast.criteria._chunks import Cut, alike, flat, halves_by_class
from dop_fast.criteria._networks import masked, redrawn
from dop_fast.criteria._weighed import weighed
from dop_fast.engine import Precision, hessian_gradient
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = True
PASSES = 2
VARIANTS = ("clean", "published")
CHUNK = 20


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    temperature: float = 200.0,
    precision: Precision = "exact",
    variant: str = "clean",
    image: tuple[int, ...] = (),
    mask: dict[str, Tensor] | None = None,
) -> Scores:
    """Return theta * Hg of the loss of logits / temperature.

    The seed has no effect but on the draw of `published`, nor has `image`, of which an empty one
    is that of the first batch.
    """

    def tempered(logits: Tensor, labels: Tensor) -> Tensor:
        return loss(logits / temperature, labels)

    used: Loss = tempered
    if variant == "published":
        small = max(image[1:] or _shape(batches)[2:], default=0) <= SMALL_SIDE
        model = _redrawn(model, seed, all_linear=small)
        batches = halves_by_class(batches) if small else Cut(batches, CHUNK)
        used = alike(tempered)
    network = masked(model, mask)
    hg = hessian_gradient(network, batches, used, precision)
    return weighed(network, hg, absolute=False)


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of these scores."""
    values = flat(scores)
    removed = int(len(values) * (1 - density))
    if not removed:
        return len(values)
    return int((values >= values.kthvalue(removed).values).sum())


def _shape(batches: Batches) -> tuple[int, ...]:
    for images, _ in batches:
        return tuple(images.shape)
    return ()


def _redrawn(model: nn.Module, seed: int, *, all_linear: bool) -> nn.Module:
    names = [
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    ]
    return redrawn(model, names if all_linear else names[-1:], _xavier, seed)


def _xavier(drawn: Tensor, generator: Generator) -> None:
    nn.init.xavier_normal_(drawn, generator=generator)
