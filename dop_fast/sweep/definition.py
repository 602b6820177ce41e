"""The sweep file: what is compared with what, checked before anything is computed."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dop_fast import criteria
from dop_fast.config import PruneConfig, StitchConfig, TrainConfig
from dop_fast.errors import ConfigError
from dop_fast.sweep.anchors import of_set
from dop_fast.workspace import read_toml

READY = Path(__file__).with_name("ready")
"""Folder of the files that come with dopfast."""


@dataclass(frozen=True)
class Grid:
    """Rows of the table: every criterion on every material, at every sparsity.

    A criterion that needs no data makes one row, whatever the materials. `prune` and `stitch` hold
    the settings that differ from the defaults; with `stitch`, stitched patches are made for it.
    `likened`: each row is followed by its control, random masks of the same layer densities.
    """

    criteria: tuple[str, ...]
    sparsities: tuple[float, ...]
    materials: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    prune: Mapping[str, Any] = field(default_factory=dict)
    stitch: Mapping[str, Any] = field(default_factory=dict)
    likened: bool = False


LIKE = "same-densities"
"""The control that every row has one of its own of."""
GRID_KEYS = tuple(item.name for item in fields(Grid) if item.name != "likened")
TABLES = ("prune", "stitch")
EXAMPLES = {"criteria": '["grasp"]', "sparsities": "[0.9, 0.95]"}
TOP_KEYS = (
    *GRID_KEYS, "controls", "grid", "name", "model", "seeds", "dense", "baseline", "anchors",
    "finetune",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A comparison on one workspace; `model` is empty where it is the workspace's.

    `baseline` is what paired differences are taken to: a material, and then every row is held
    against its own criterion on it, or the label of one row for all, such as "grasp · images";
    empty: images, where they are compared. `anchors` names a set of published figures.
    """

    name: str
    grids: tuple[Grid, ...]
    seeds: tuple[int, ...]
    finetune: TrainConfig
    model: str = ""
    dense: bool = True
    baseline: str = ""
    anchors: str = ""


def ready() -> tuple[str, ...]:
    """Return the names of the files that come with dopfast."""
    return tuple(sorted(path.name for path in READY.glob("*.toml")))


def find(name: str) -> Path:
    """Return the sweep file at a path, else the one of that name that comes with dopfast."""
    path = Path(name)
    if path.is_file():
        return path
    inside = READY / (name if name.endswith(".toml") else f"{name}.toml")
    if path.parent == Path() and inside.is_file():
        return inside
    raise ConfigError(
        f"there is no sweep file {name}",
        _nearest(name, ready()) or f"these come with dopfast: {', '.join(ready())}",
    )


def load(path: Path, first_seed: int = 0) -> Sweep:
    """Read and check a sweep file; ConfigError names the nearest right key, criterion, material.

    `seeds = 3` are three seeds from `first_seed` on, a list is taken as it is.
    """
    return parse(read_toml(path), path.stem, first_seed)


def parse(content: Mapping[str, Any], name: str, first_seed: int = 0) -> Sweep:
    """Return the sweep that the tables of a sweep file say."""
    _check_keys(content, TOP_KEYS, name)
    shared = {key: content[key] for key in GRID_KEYS if key in content}
    own = content.get("grid", [])
    if not isinstance(own, list) or not all(isinstance(table, dict) for table in own):
        raise ConfigError("grid must be tables", "write each as [[grid]]")
    grids = []
    if shared.get("criteria"):
        grids.append(_grid(shared, name))
    for table in own:
        _check_keys(table, GRID_KEYS, "grid")
        merged = {**shared, **table}
        for key in TABLES:
            merged[key] = {**shared.get(key, {}), **table.get(key, {})}
        grids.append(_grid(merged, "grid"))
    controls = _list(content, "controls")
    if LIKE in controls:
        grids = [replace(grid, likened=True) for grid in grids]
    grids += _controls(tuple(name for name in controls if name != LIKE), shared, grids)
    if not grids:
        raise ConfigError(f"{name} compares nothing", 'say what: criteria = ["grasp"]')
    model, label, baseline, anchors = (
        _typed(content, key, str, default)
        for key, default in (("model", ""), ("name", name), ("baseline", ""), ("anchors", ""))
    )
    of_set(anchors)  # refuses an unknown one now
    return Sweep(
        name=label,
        grids=tuple(grids),
        seeds=_seeds(content.get("seeds", 3), first_seed),
        finetune=TrainConfig.from_dict(_typed(content, "finetune", dict, {}), "finetune"),
        model=model,
        dense=_typed(content, "dense", bool, True),
        baseline=baseline,
        anchors=anchors,
    )


def _grid(values: Mapping[str, Any], where: str) -> Grid:
    lists = {key: _list(values, key) for key in GRID_KEYS if key not in TABLES}
    tables = {key: _typed(values, key, dict, {}) for key in TABLES}
    given: dict[str, Any] = {**lists, **tables}
    grid = Grid(**given)
    for key in ("criteria", "sparsities"):
        if not lists[key]:
            raise ConfigError(f"[{where}] has no {key}", f"such as {key} = {EXAMPLES[key]}")
    for criterion in grid.criteria:
        refuse_unknown("criterion", criterion, criteria.names())
        if criterion == LIKE:
            raise ConfigError(f"{LIKE} is a control of the other rows", f'controls = ["{LIKE}"]')
        if criteria.load(criterion).NEEDS_DATA and not grid.materials:
            raise ConfigError(
                f"{criterion} needs something to be scored on", 'such as materials = ["images"]'
            )
    for key in ("criterion", "variant", "material", "sparsity"):
        if key in grid.prune:
            raise ConfigError(
                f"[prune] of a sweep cannot say the {key}", "give it in its list, above the tables"
            )
    named = ("material", grid.materials), ("variant", grid.variants), ("sparsity", grid.sparsities)
    for key, items in named:
        for item in items:
            PruneConfig.from_dict({**grid.prune, key: item}, "prune")
    StitchConfig.from_dict(grid.stitch, "stitch")
    return grid


def _list(values: Mapping[str, Any], key: str) -> tuple[Any, ...]:
    given = tuple(dict.fromkeys(_typed(values, key, list, [])))
    _check_items(key, given, (int, float) if key == "sparsities" else str)
    return given


def _controls(names: tuple[str, ...], shared: Mapping[str, Any], grids: list[Grid]) -> list[Grid]:
    """Return the rows of the controls, at every sparsity of the others."""
    for name in names:
        refuse_unknown("criterion", name, criteria.names())
        if criteria.load(name).NEEDS_DATA:
            raise ConfigError(
                f"{name} needs data, so it is no control", "put it under criteria, with materials"
            )
    if not names:
        return []
    everywhere = sorted({at for grid in grids for at in grid.sparsities})
    sparsities = everywhere or _list(shared, "sparsities")
    return [_grid({"criteria": list(names), "sparsities": list(sparsities)}, "controls")]


def _seeds(given: object, first: int) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return tuple(range(first, first + given))
    if isinstance(given, list) and given:
        _check_items("seeds", tuple(given), int)
        return tuple(dict.fromkeys(given))
    raise ConfigError(f"seeds must be a count or a list, got {given!r}", "such as seeds = 3")


def _check_items(name: str, values: tuple[Any, ...], kind: type | tuple[type, ...]) -> None:
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{name} cannot hold {value!r}", f"see the sweep file's {name}")


def _typed(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if not isinstance(value, kind):
        raise ConfigError(f"{key} must be of type {kind.__name__}, got {value!r}", "mend that line")
    return value


def _check_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        refuse_unknown(f"key in [{where}]", key, tuple(known))


def refuse_unknown(what: str, word: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError with the nearest known word."""
    if word not in known:
        hint = _nearest(word, known) or f"one of: {', '.join(known)}"
        raise ConfigError(f"there is no {what} called {word!r}", hint)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {near[0]!r}?" if near else ""
