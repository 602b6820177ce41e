"""How far scores and masks agree, as numbers, tables and plots: what `sanity` measured."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from dop_fast.report import charts
from dop_fast.report.plots import Panel, Styles
from dop_fast.report.table import Estimate, estimate
from dop_fast.report.ways import series
from dop_fast.sanity import read
from dop_fast.sanity.extrapolation import Needed, needed


@dataclass(frozen=True)
class Point:
    """Two halves of `items`, over splits; `regrouped` is the first half's own, in other chunks."""

    items: int
    halves: Mapping[str, Estimate]
    regrouped: Mapping[str, Estimate]


@dataclass(frozen=True)
class Curve:
    """One criterion on one material, fewest items first."""

    criterion: str
    material: str
    points: tuple[Point, ...]
    needed: Needed

    @property
    def name(self) -> str:
        """Name criterion and material."""
        return series(self.criterion, self.material)


NONE = "\N{EN DASH}"
COUNTS = ("items a half", "splits")


class Table(NamedTuple):
    """A table of texts."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Study(NamedTuple):
    """What the page shows of one file; `rows` are its curves."""

    title: str
    splits: int
    rows: list[Curve]
    tables: list[Table]

    def panels(self, look: Styles) -> list[Panel]:
        """Draw cosine and Jaccard of each criterion, in the colours of the ways."""
        return [panel for one in _criteria(self.rows) for panel in _panels(one, self.rows, look)]


def studies(folder: Path) -> list[Study]:
    """Return every file of results in a workspace, lowest sparsity and whole items first."""
    found = [read(path) for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)]
    found.sort(key=lambda content: [content["about"][key] for key in ("sparsity", "seed")])
    return [_study(content) for content in found if content["reliability"]]


def _study(content: Mapping[str, Any]) -> Study:
    about, rows = content["about"], curves(content)
    shown = [reliability_table(rows), control_table(content), material_table(content)]
    crops = "" if about["augment"] == "none" else f", {about['augment']} crops"
    return Study(
        f"{about['model']}, {100 * about['sparsity']:.4g} % sparsity, seed {about['seed']}{crops}",
        max(point.halves["cosine"].n for curve in rows for point in curve.points),
        rows,
        [table for table in shown if table.rows],
    )


def curves(content: Mapping[str, Any]) -> list[Curve]:
    """Gather the cells of a file of results, by criterion and material."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in content["reliability"].values():
        cells.setdefault((cell["criterion"], cell["material"]), []).append(cell)
    return [_curve(*way, found, content["target"]) for way, found in sorted(cells.items())]


def _curve(
    criterion: str, material: str, cells: Sequence[Mapping[str, Any]], target: float
) -> Curve:
    sizes = sorted({cell["items"] for cell in cells})
    points: list[Point] = []
    by_split: dict[int, dict[int, float]] = {}
    for items in sizes:
        own = [cell for cell in cells if cell["items"] == items]
        again = [cell["regrouped"] for cell in own if cell["regrouped"]]
        points.append(Point(items, _means(cell["halves"] for cell in own), _means(again)))
        for cell in own:
            by_split.setdefault(cell["split"], {})[items] = cell["halves"]["cosine"]
    return Curve(criterion, material, tuple(points), needed(list(by_split.values()), target))


def _means(found: Iterable[Mapping[str, Any]]) -> dict[str, Estimate]:
    flat = [{**one, **one["masks"]} for one in found]
    keys = [key for key in flat[0] if key != "masks"] if flat else []
    return {key: estimate(one[key] for one in flat) for key in keys}


def _text(found: Estimate) -> str:
    return f"{found.mean:.3f}" + (f" ± {found.half:.3f}" if found.interval else "")


def _beside(found: Mapping[str, Estimate], key: str, *chances: str) -> str:
    levels = " / ".join(f"{found[name].mean:.3f}" for name in chances)
    return f"{_text(found[key])} ({levels})"


def reliability_table(rows: Sequence[Curve]) -> Table:
    """Return every point, each figure with its chance level, and what a stable mask needs."""
    made: list[tuple[str, ...]] = []
    for curve in rows:
        for point in curve.points:
            last = point is curve.points[-1]
            made.append(
                (
                    curve.name,
                    f"{point.items:,}",
                    str(point.halves["cosine"].n),
                    _beside(point.halves, "cosine", "cosine_layers"),
                    _beside(point.halves, "spearman", "spearman_layers"),
                    _beside(point.halves, "jaccard", "chance", "chance_layers"),
                    _text(point.regrouped["cosine"]) if point.regrouped else NONE,
                    _text(point.regrouped["jaccard"]) if point.regrouped else NONE,
                    curve.needed.text() if last else "",
                )
            )
    target = rows[0].needed.target if rows else 0.0
    header = (
        "criterion · material", *COUNTS, "cosine (layers)", "rank (layers)",
        "Jaccard (chance / layers)", "other chunks: cosine", "other chunks: Jaccard",
        f"items for cosine {target:g}",
    )  # fmt: skip
    return Table(header, made)


def control_table(content: Mapping[str, Any]) -> Table:
    """Return what each control's mask shares with its original."""
    rows = [
        (series(*key.split("/")[:2]), key.split("/")[2], *_overlap(row), _top1(row))
        for key, row in sorted(content["controls"].items(), key=lambda item: _way(item[0]))
        if key.split("/")[2] != "original" or "top1" in row
    ]
    return Table(
        ("criterion · material", "control", "Jaccard with the original", "chance", "chance, layers",
         "moved between layers", "top-1, %"), rows
    )  # fmt: skip


def material_table(content: Mapping[str, Any]) -> Table:
    """Return what the masks of two materials share."""
    rows = [
        (criterion, f"{first} | {second}", *_overlap(row))
        for key, row in sorted(content["materials"].items())
        for criterion, first, second in [key.split("/")]
    ]
    return Table(
        ("criterion", "materials", "Jaccard", "chance", "chance, layers", "moved between layers"),
        rows,
    )


def _way(key: str) -> list[str]:
    return key.split("/")[:2]  # sorting is stable: controls stay as they were made


def _overlap(row: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(f"{row[key]:.3f}" for key in ("jaccard", "chance", "chance_layers", "moved"))


def _top1(row: Mapping[str, float]) -> str:
    return f"{100 * row['top1']:.2f}" if "top1" in row else NONE


def _criteria(rows: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.criterion for curve in rows))


def _panels(criterion: str, rows: Sequence[Curve], look: Styles) -> list[Panel]:
    own = [curve for curve in rows if curve.criterion == criterion]
    return [
        Panel(f"{criterion}: cosine of the scores", _plot(own, look, "cosine", "cosine_layers")),
        Panel(f"{criterion}: Jaccard of the masks", _plot(own, look, "jaccard", "chance_layers")),
    ]


def _plot(rows: Sequence[Curve], look: Styles, key: str, chance: str) -> Markup:
    lines = []
    for curve in rows:
        items = [point.items for point in curve.points]
        found = [point.halves[key] for point in curve.points]
        by_chance = [point.halves[chance].mean for point in curve.points]
        css = look[curve.name]
        lines.append(
            charts.Line(curve.material, css, items, [one.mean for one in found],
                        [one.half for one in found], dots=True)
        )  # fmt: skip
        lines.append(charts.Line(f"{curve.material}, by chance", f"{css} dashed", items, by_chance))
    sizes = sorted({point.items for curve in rows for point in curve.points})
    low = min(0.0, *(value for line in lines for value in line.y))  # no interval reaches over 1
    x_axis = charts.Axis(
        sizes[0] / 1.2, sizes[-1] * 1.2, [(n, f"{n:,}") for n in sizes], "items a half", log=True
    )
    y_axis = charts.axis([low, 1.0], "")
    return charts.lines(lines, x_axis, y_axis, f"{key} against the number of items")
