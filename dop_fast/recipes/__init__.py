"""Named settings of trainings, as published: one TOML file each, with its source."""

import tomllib
from pathlib import Path
from typing import Any

from dop_fast.errors import ConfigError, nearest

FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def read(name: object) -> dict[str, Any]:
    """Return the settings of a recipe; ConfigError with the nearest name where there is none."""
    if name not in names():
        raise ConfigError(f"there is no recipe called {name!r}", nearest(str(name), names()))
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
