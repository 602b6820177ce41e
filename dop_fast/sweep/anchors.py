"""Published figures beside one's own: their source, their recipe, and where it differs."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dop_fast.errors import ConfigError

FILE = Path(__file__).with_name("anchors.toml")
RECIPE = (
    "model", "classes", "size", "epochs", "milestones", "batch_size", "lr", "weight_decay",
    "items", "seeds",
)  # fmt: skip
"""What a recipe may state; `items` is how many images or patches the weights were scored on."""


@dataclass(frozen=True)
class Anchor:
    """One published row: top-1 in percent by sparsity, its source, and what is known of how."""

    name: str
    criterion: str
    material: str
    top1: Mapping[float, float]
    source: str
    recipe: Mapping[str, Any]
    sigma: float | None = None

    def differences(self, ours: Mapping[str, Any]) -> tuple[str, ...]:
        """Return in what its recipe differs from `ours`, such as "epochs 150, ours 120"."""
        return tuple(
            f"{key.replace('_', ' ')} {_text(self.recipe[key])}, ours {_text(ours[key])}"
            for key in RECIPE
            if key in self.recipe and key in ours and not _equal(self.recipe[key], ours[key])
        )

    def unknown(self, ours: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what of `ours` its source does not state."""
        return tuple(
            key.replace("_", " ") for key in RECIPE if key in ours and key not in self.recipe
        )

    def told(self) -> str:
        """Return its recipe in words."""
        return ", ".join(
            f"{key.replace('_', ' ')} {_text(self.recipe[key])}"
            for key in RECIPE
            if key in self.recipe
        )


@cache
def read() -> dict[str, tuple[Anchor, ...]]:
    """Return all anchors by the name of their set."""
    sets: dict[str, list[Anchor]] = {}
    for row in tomllib.loads(FILE.read_text(encoding="utf-8"))["anchor"]:
        top1 = {float(at): float(value) for at, value in row.pop("top1").items()}
        sets.setdefault(row.pop("set"), []).append(Anchor(top1=top1, **row))
    return {name: tuple(rows) for name, rows in sets.items()}


def of_set(name: str) -> tuple[Anchor, ...]:
    """Return the anchors of one set, none for an empty name; ConfigError where there is no such."""
    if name and name not in read():
        raise ConfigError(f"there are no anchors {name!r}", f"one of: {', '.join(read())}")
    return read()[name] if name else ()


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, list):
        return [round(x, 3) for x in theirs] == [round(x, 3) for x in ours]
    return bool(theirs == ours)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(f"{x:.3g}" for x in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
