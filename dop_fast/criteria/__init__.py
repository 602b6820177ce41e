"""Pruning criteria: one file each, found by its name.

A criterion is a module with `NEEDS_DATA` and `score`; to add one, add a file. Files that start
with an underscore are not criteria. What else a module may have:

    ROUNDS    its own number of rounds of scoring and removing, 1 without it
    PASSES    how often a round goes through the batches, 1 without it; for the time left
    REVIVES   whether weights that a round removed may come back, false without it
    VARIANTS  ("clean", "published") where it follows its published code too on request
    check     (model, sparsity) raises where it cannot score this network, or not for that sparsity
    prepare   (model) changes a network in place before it is scored and before it is trained
    kept      (scores, density) -> how many of all weights its published code would keep, by its
              rounding and its rule for ties; without it, exactly the rounded share

Knobs of `score` that mean the same everywhere: `precision`, see `dop_fast.engine`, which all have
that need data; `variant`; `mask`, bool by parameter name, the weights that the rounds so far left:
the network is scored without the others; `image`, channels, height and width of an input.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, cast

from dop_fast.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn

    from dop_fast.types import Batches, Loss, Scores


class Criterion(Protocol):
    """What a file of this folder offers; own knobs are keyword-only and have defaults."""

    NEEDS_DATA: bool

    def score(
        self, model: "nn.Module", batches: "Batches", loss: "Loss", seed: int, **knobs: Any
    ) -> "Scores":
        """Return a score for every prunable weight, on the model's device; higher = keep.

        The model is left as found. Scores depend on the chunks that `batches` come in where
        the model has batch norm, which takes its statistics over each of them.
        """
        ...


def names() -> tuple[str, ...]:
    """Return the names of all criteria, sorted; loads none of them."""
    files = (module.name for module in iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in files if not name.startswith("_")))


def load(name: str, variant: str = "clean") -> Criterion:
    """Return the criterion of that name; ConfigError where there is none, or no such variant."""
    known = names()
    if name not in known:
        raise ConfigError(f"there is no criterion {name!r}", nearest(name, known))
    criterion = cast(Criterion, import_module(f"{__name__}.{name.replace('-', '_')}"))
    variants = getattr(criterion, "VARIANTS", ("clean",))
    if variant not in variants:
        raise ConfigError(f"{name} has no variant {variant!r}", nearest(variant, variants))
    return criterion


def check(criterion: Criterion, model: "nn.Module", sparsity: float) -> None:
    """Raise what `criterion.check` does, before anything is computed."""
    own = getattr(criterion, "check", None)
    if own is not None:
        own(model, sparsity)
