"""What has come out of a sweep so far, seed by seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dop_fast.report.table import Comparison, Estimate
from dop_fast.sweep import statistics
from dop_fast.sweep.cells import BASELINE, DENSE, Row, labels
from dop_fast.sweep.definition import Sweep
from dop_fast.sweep.running import Book
from dop_fast.sweep.statistics import BySeed


@dataclass(frozen=True)
class Results:
    """Top-1 as shares: of every row by sparsity and seed, and of the dense network by seed.

    `names` holds every row, done or not; `recipe` is how all of them were trained, in the words of
    `anchors.RECIPE` (without `items`, which differs between rows).
    """

    sweep: Sweep
    names: Mapping[Row, str]
    top1: Mapping[Row, Mapping[float, BySeed]]
    dense: BySeed
    sparsities: tuple[float, ...]
    recipe: Mapping[str, Any]
    cells: int
    done: int

    def baseline(self, row: Row, sparsity: float) -> Row | None:
        """Return the row that `row` is held against; None where it is that row, or there is none.

        That is the row called `sweep.baseline`, or the same criterion on that material: with the
        same settings where there is such a row, else the first. A control is held against the row
        whose layer densities it has.
        """
        if row.like:
            return row.like if sparsity in self.top1.get(row.like, {}) else None
        wanted = self.sweep.baseline or BASELINE
        there = [other for other in self.names if sparsity in self.top1.get(other, {})]
        called = [other for other in there if wanted in (other.label, self.names[other])]
        if not called:
            called = [
                other
                for other in there
                if other.material == wanted
                and (other.criterion, other.variant) == (row.criterion, row.variant)
            ]
            called.sort(key=lambda other: other.extra != row.extra)  # stable: else the first
        return called[0] if called and row not in called else None

    def recipe_of(self, row: Row | None) -> dict[str, Any]:
        """Return how a row was made, for comparison with a published one."""
        classes = self.recipe["classes"]
        if row is None or not row.material:
            return dict(self.recipe)
        return {**self.recipe, "items": classes * row.pruning(0.5).per_class}

    @property
    def comparison(self) -> Comparison:
        """The estimates, as the report's plots take them."""
        rows: dict[str, dict[float, Estimate]] = {}
        for row, name in self.names.items():
            for at, figures in self.top1.get(row, {}).items():
                found = statistics.over_seeds(figures)
                if found:
                    rows.setdefault(name, {})[at] = found
        shown = tuple(at for at in self.sparsities if any(at in row for row in rows.values()))
        dense = statistics.over_seeds(self.dense)
        return Comparison(shown, rows, {DENSE: dense} if dense else {})


def collect(book: Book) -> Results:
    """Read every finished run of a sweep."""
    top1: dict[Row, dict[float, dict[int, float]]] = {}
    dense: dict[int, float] = {}
    finished = 0
    for cell in book.cells:
        run = book.run(cell)
        if run is None:
            continue
        finished += 1
        row = top1.setdefault(cell.row, {}).setdefault(cell.sparsity, {}) if cell.row else dense
        row[cell.seed] = float(run.result["top1"])
    rows = list(dict.fromkeys(cell.row for cell in book.cells if cell.row))
    finetune = book.sweep.finetune
    recipe = {
        "model": book.workspace(None).model.name,
        "classes": len(book.train.classes),
        "size": book.space.data.size,
        "seeds": len(book.sweep.seeds),
        **{
            key: getattr(finetune, key)
            for key in ("epochs", "milestones", "batch_size", "lr", "weight_decay")
        },
    }
    return Results(
        book.sweep,
        labels(rows),
        top1,
        dense,
        tuple(sorted({cell.sparsity for cell in book.cells if cell.row})),
        recipe,
        len(book.cells),
        finished,
    )
