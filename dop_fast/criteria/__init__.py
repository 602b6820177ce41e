"""Pruning criteria: one file each, found by its name.

A criterion is a module with `NEEDS_DATA` and `score`; to add one, add a file. Files that start
with an underscore are not criteria.
"""

import difflib
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, cast

from dop_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from dop_fast.types import Batches, Loss, Scores


class Criterion(Protocol):
    """What a file of this folder offers; own knobs are keyword-only and have defaults.

    One that needs data has `precision`, see `dop_fast.engine`.
    """

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


def load(name: str) -> Criterion:
    """Return the criterion of that name; ConfigError where there is none."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(
            f"there is no criterion {name!r}",
            f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}",
        )
    return cast(Criterion, import_module(f"{__name__}.{name.replace('-', '_')}"))
