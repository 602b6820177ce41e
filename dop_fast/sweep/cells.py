"""The cells of a sweep: one pruning and one training each, with names that say which."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dop_fast import criteria
from dop_fast.config import PruneConfig, StitchConfig, TrainConfig
from dop_fast.report.ways import told_apart
from dop_fast.runs import WITHOUT_EFFECT
from dop_fast.settings import StageConfig, fingerprint
from dop_fast.sweep.definition import LIKE, Grid, Sweep, refuse_unknown
from dop_fast.workspace import Workspace

DENSE, BASELINE = "dense", "images"


@dataclass(frozen=True)
class Row:
    """A way of pruning, whatever the sparsity and the seed; `extra` are settings that differ.

    `stitch` are the settings of stitched patches that are made for this row, if any are. `like` is
    the row whose layer densities a control has.
    """

    criterion: str
    variant: str = ""
    material: str = ""
    extra: tuple[tuple[str, Any], ...] = ()
    stitch: StitchConfig | None = None
    like: "Row | None" = None

    @property
    def label(self) -> str:
        """Name it without its settings."""
        if self.like:
            return f"{self.criterion} ({self.like.label})"
        way = f"{self.criterion} ({self.variant})" if self.variant else self.criterion
        return f"{way} · {self.material}" if self.material else way

    @property
    def settings(self) -> dict[str, Any]:
        """What sets it apart from rows of the same label."""
        if self.like:
            return self.like.settings
        made = {} if self.stitch is None else {"sigma": self.stitch.sigma}
        return {**dict(self.extra), **made}

    def pruning(self, sparsity: float) -> PruneConfig:
        """Return the settings of its pruning."""
        values = {"variant": self.variant, "material": self.material}
        given = {key: value for key, value in values.items() if value}
        own = {"criterion": self.criterion, "sparsity": sparsity, **dict(self.extra)}
        return PruneConfig.from_dict({**given, **own}, "prune")


@dataclass(frozen=True)
class Cell:
    """One training: of `row` at `sparsity` from the initial weights of `seed`, or dense.

    `mask` and `run` are the names of what it makes; it is claimed by `key`, which cells of other
    sweeps that share the mask have too. `like` names the mask whose layer densities it takes.
    """

    row: Row | None
    sparsity: float
    seed: int
    mask: str
    run: str
    like: str = ""

    @property
    def key(self) -> str:
        """What may be worked on by one process at a time."""
        return self.mask or self.run


def cells(sweep: Sweep, space: Workspace) -> tuple[Cell, ...]:
    """Return every cell once, seed by seed, so that comparisons are complete early.

    ConfigError where the baseline is none of the rows.
    """
    model = sweep.model or space.model.name
    rows = [(row, grid.sparsities) for grid in sweep.grids for row in rows_of(grid)]
    if sweep.baseline:
        named = labels([row for row, _ in rows])
        known = {*named.values(), *(row.label for row in named), *(row.material for row in named)}
        refuse_unknown("row or material", sweep.baseline, tuple(sorted(known - {""})))
    columns = sorted({sparsity for _, sparsities in rows for sparsity in sparsities})
    found: dict[str, Cell] = {}
    for seed in sweep.seeds:
        if sweep.dense:
            run = f"{DENSE}-s{seed}-{fingerprint(model, changed(sweep.finetune))[:8]}"
            found[run] = Cell(None, 0.0, seed, "", run)
        for at in columns:
            for row, sparsities in rows:
                if at in sparsities:
                    cell = _cell(row, at, seed, model, sweep.finetune)
                    found[cell.run] = cell
    return tuple(found.values())


def rows_of(grid: Grid) -> Iterator[Row]:
    """Return the rows of a grid, each with its control behind it where the grid is likened."""
    for row in _scored(grid):
        yield row
        if grid.likened:
            yield Row(LIKE, like=row)


def _scored(grid: Grid) -> Iterator[Row]:
    """Return the rows; settings of data do not count where a criterion needs none."""
    about_data = {item.name for item in fields(PruneConfig) if item.metadata["panel"] == "Data"}
    config = PruneConfig.from_dict(grid.prune, "prune")
    own = tuple((key, getattr(config, key)) for key in sorted(changed(config)))
    stitch = StitchConfig.from_dict(grid.stitch, "stitch") if grid.stitch else None
    for criterion in grid.criteria:
        for variant in grid.variants or ("",):
            if not criteria.load(criterion).NEEDS_DATA:
                without = tuple(item for item in own if item[0] not in about_data)
                yield Row(criterion, variant, "", without)
                continue
            for material in grid.materials:
                yield Row(criterion, variant, material, own, stitch if uses(material) else None)


def uses(material: str) -> bool:
    """Return whether a material is made of stitched patches."""
    return "stitched" in material or material == "auto"


def changed(config: StageConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults and change what comes out."""
    plain = type(config)().to_dict()
    return {
        key: value
        for key, value in config.to_dict().items()
        if value != plain[key] and key not in WITHOUT_EFFECT
    }


def _cell(row: Row, sparsity: float, seed: int, model: str, finetune: TrainConfig) -> Cell:
    own = row.like or row
    parts = (own.criterion, own.variant, own.material, f"{sparsity:.10g}", f"s{seed}")
    stitch = own.stitch.to_dict() if own.stitch else None
    about = fingerprint(model, dict(own.extra), *([stitch] if stitch else []))[:8]
    scored = "-".join([*filter(None, parts), about])
    mask = f"{row.criterion}-{scored}" if row.like else scored
    run = f"{mask}-{fingerprint(changed(finetune))[:6]}"
    return Cell(row, sparsity, seed, mask, run, scored if row.like else "")


def labels(rows: Mapping[Row, object] | list[Row]) -> dict[Row, str]:
    """Name every row; where labels are equal, by the settings that set them apart."""
    default = {**PruneConfig().to_dict(), "sigma": "own"}
    labelled = [(row.label, {**default, **row.settings}) for row in rows]
    return dict(zip(rows, told_apart(labelled), strict=True))
