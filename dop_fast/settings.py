"""A setting and a stage's settings: declared once, checked when they are made."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from dop_fast.errors import ConfigError, nearest

T = TypeVar("T")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def setting(
    default: T,
    help: str,
    *,
    panel: str = "Options",
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    choices: tuple[str, ...] = (),
) -> T:
    """Declare one setting: its default and, for every reader of it, its meaning and range."""
    about = {
        "help": help,
        "panel": panel,
        "range": (low, high, open_low, open_high),
        "choices": choices,
    }
    made: T = field(default=default, metadata=about)
    return made


@dataclass(frozen=True)
class StageConfig:
    """Settings of one stage, checked when made."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _check_type(item, value)
            _check_range(item, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from TOML values; an unknown key is refused with the nearest known one."""
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"[{where}] has an unknown key: {key}", nearest(key, known))
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**lists)
        except ConfigError as error:
            raise ConfigError(f"[{where}] {error.message}", error.hint) from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON and TOML."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }


def fingerprint(*parts: Any) -> str:
    """Return a short hash of JSON-able values, for "is this still the same?"."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_remote(address: str | Path) -> bool:
    """Return whether it is an fsspec address rather than a path."""
    return isinstance(address, str) and "://" in address


def _check_type(item: "dataclasses.Field[Any]", value: object) -> None:
    of, many = type(item.default), ""
    items: Iterable[object] = [value]
    if isinstance(item.default, tuple):
        of = type(item.default[0]) if item.default else int  # n_segments alone has no default
        items, many = value if isinstance(value, tuple) else [None], "a list, each "
    if not all(_fits(one, of) for one in items):
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(
            f"{item.name} must be {many}{KINDS[of]}, got {shown!r}",
            f"{item.name}: {item.metadata['help']}",
        )


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _check_range(item: "dataclasses.Field[Any]", value: Any) -> None:
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{item.name} does not know {value!r}", nearest(str(value), choices))
    low, high, open_low, open_high = item.metadata["range"]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, str | bool):
            continue
        above = number > low if open_low else number >= low
        below = number < high if open_high else number <= high
        if not (above and below):  # also catches NaN
            raise ConfigError(
                f"{item.name} must lie in {span(item)}, got {number}",
                f"{item.name}: {item.metadata['help']}",
            )


def span(item: "dataclasses.Field[Any]") -> str:
    """Return a setting's range in mathematical notation, or an empty text."""
    low, high, open_low, open_high = item.metadata["range"]
    if math.isinf(low) and math.isinf(high):
        return ""
    left = "(" if open_low or math.isinf(low) else "["
    right = ")" if open_high or math.isinf(high) else "]"
    bounds = ["-inf" if math.isinf(low) else f"{low:g}", "inf" if math.isinf(high) else f"{high:g}"]
    return f"{left}{', '.join(bounds)}{right}"
