"""SmartRatio: random, with fewer weights the deeper a layer is (Su et al., 2020).

Linear layers keep 0.3. Convolution i of L layers keeps in proportion to k^2 + k with k = L - i + 1,
in networks without residual blocks over i^2 too, and at most all. `clean`: what a layer has no room
for, all others share. `published` follows the code (JingtongSu/sanity-checking-pruning): what a
layer has no room for goes to the next ones in order, and counts are truncated, so that it keeps
some weights too few: as many as `kept` says. Where the exact count is kept, those next to each
layer's limit are added.
"""

from torch import Tensor, nn

from dop_fast.criteria._lots import lots
from dop_fast.errors import ConfigError
from dop_fast.models import prunable
from dop_fast.residual import branch_ends
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False
VARIANTS = ("clean", "published")
LINEAR = 0.3
SURE = 1e30


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    sparsity: float | None = None,
    variant: str = "clean",
) -> Scores:
    """Return scores by lot; `clean` holds for every sparsity, `published` for the one given.

    Raises `ConfigError` as `check`.
    """
    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    drawn = lots(model, seed, "smart-ratio")
    if sparsity is not None:
        check(model, sparsity)
    if variant == "published":
        counts = _published(weights, _claims(model), sparsity)
        # above 0 up to the count, and then ever lower
        return {name: counts[name] / u.numel() - u for name, u in drawn}
    claims = _claims(model)
    return {
        name: claims[name] / u if name in claims else (u < LINEAR) * SURE - u for name, u in drawn
    }


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of its scores."""
    return sum(int((score > 0).sum()) for score in scores.values())


def _is_linear(weight: Tensor) -> bool:
    return weight.dim() == 2


def _claims(model: nn.Module) -> dict[str, float]:
    """Return what every convolution's density is proportional to."""
    layers = prunable(model)
    residual = bool(branch_ends(model))
    claims = {}
    for i, (name, weight) in enumerate(layers.items(), start=1):
        k = len(layers) - i + 1
        if not _is_linear(weight):
            claims[name] = (k * k + k) / (1 if residual else i * i)
    return claims


def check(model: nn.Module, sparsity: float) -> None:
    """Raise `ConfigError` where the linear layers alone would keep more than is left."""
    weights = prunable(model).values()
    linear = sum(weight.numel() for weight in weights if _is_linear(weight))
    total = sum(weight.numel() for weight in weights)
    limit = 1 - LINEAR * linear / total
    if sparsity >= limit:
        raise ConfigError(
            f"SmartRatio keeps {LINEAR:.0%} of linear layers, which leaves no weight for "
            f"convolutions at a sparsity of {sparsity:g}",
            f"stay below {limit:.3f}, or take --criterion random-erk",
        )


def _published(
    weights: dict[str, Tensor], claims: dict[str, float], sparsity: float | None
) -> dict[str, int]:
    """Return the count that the code keeps of each layer."""
    if sparsity is None:
        raise ConfigError("the published SmartRatio needs a sparsity", "give sparsity=0.9")
    sizes = {name: weight.numel() for name, weight in weights.items()}
    linear = sum(sizes.values()) - sum(sizes[name] for name in claims)
    goal = int(sum(sizes.values()) * (1 - sparsity)) - int(LINEAR * linear)
    factor = goal / max(1, sum(int(sizes[name] * claim) for name, claim in claims.items()))
    ratios = {name: claim * factor for name, claim in claims.items()}
    extra = 0
    for name, ratio in ratios.items():
        room = int((1 - ratio) * sizes[name])  # negative: too much
        ratios[name] = 1.0 if extra > room else ratio + extra / sizes[name]
        extra = max(0, extra - room)
        if not extra:
            break
    counts = {name: int(min(1.0, ratio) * sizes[name]) for name, ratio in ratios.items()}
    return {name: counts.get(name, int(LINEAR * size)) for name, size in sizes.items()}
