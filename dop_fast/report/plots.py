"""The report's plots: which lines, axes and panels; `charts` draws them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from dop_fast.masks import MaskSet
from dop_fast.report import charts, ways
from dop_fast.report.table import Comparison, Estimate, Result, sparsity

PALETTE = 8
"""Colours of the style sheet; further series take them again, dashed and then dotted."""
STROKES = ("", " dashed", " dotted")
PERCENT = 0.01


class Panel(NamedTuple):
    """A plot and its heading."""

    title: str
    chart: Markup


Styles = Mapping[str, str]
"""The CSS classes of a way or a material, the same all over the page."""


def styles(names: Iterable[str]) -> dict[str, str]:
    """Give every name a colour and a stroke; dense and teacher have none."""
    given = list(dict.fromkeys(names))
    plain = [name for name in given if name.partition(" (")[0] in ("dense", "teacher")]
    coloured = [name for name in given if name not in plain]
    made = {
        name: f"s{i % PALETTE}{STROKES[i // PALETTE % len(STROKES)]}"
        for i, name in enumerate(coloured)
    }
    return {**made, **dict.fromkeys(plain, "dense")}


def styles_of_ways(names: Iterable[str]) -> dict[str, str]:
    """Give every way the colour of its material, whatever the criterion."""
    given = sorted(set(names), key=lambda way: (not ways.family(way), ways.key(way), way))
    colours = styles(map(ways.key, given))
    return {way: colours[ways.key(way)] for way in given}


def families(names: Iterable[str]) -> dict[str, list[str]]:
    """Gather ways by their criterion, which is the heading; those without data come last."""
    found: dict[str, list[str]] = {}
    for way in sorted(set(names), key=lambda way: (not ways.family(way), way)):
        found.setdefault(ways.family(way) or "without data", []).append(way)
    return found


def reach(cells: Iterable[Estimate]) -> list[float]:
    """Return every value and interval end that a plot must hold."""
    return [value for cell in cells for value in (*cell.values, *(cell.interval or ()))]


class Figure(NamedTuple):
    """What a plot shows, however it is drawn."""

    lines: Sequence[charts.Line]
    x_axis: charts.Axis
    y_axis: charts.Axis


def accuracy(comparison: Comparison, look: Styles) -> list[Panel]:
    """Draw top-1 against sparsity as in the paper's Figure 4, a panel a criterion."""
    shared = accuracy_figure(comparison, look).y_axis
    found = []
    for title, names in families(comparison.rows).items():
        figure = accuracy_figure(comparison.of(names), look)._replace(y_axis=shared)
        found.append(Panel(title, charts.lines(*figure, f"{title}: top-1 against sparsity")))
    return found


def accuracy_figure(comparison: Comparison, look: Styles) -> Figure:
    """Return top-1 against sparsity, one line a row, with 95 % intervals.

    Rows stand a little apart, so that no interval hides another.
    """
    places = {at: i for i, at in enumerate(comparison.sparsities)}
    rows = len(comparison.rows)
    step = min(0.05, 0.4 / max(rows, 1))
    lines = [
        charts.Line(
            name,
            look[name],
            [places[at] + step * (i - (rows - 1) / 2) for at in row],
            [cell.mean for cell in row.values()],
            [cell.half for cell in row.values()],
            dots=True,
        )
        for i, (name, row) in enumerate(comparison.rows.items())
    ]
    low, high = -0.25, len(places) - 0.75
    for name, cell in comparison.dense.items():
        lines.append(charts.Line(name, look[name], [low, high], [cell.mean] * 2))
    ticks = [(i, f"{100 * at:.4g}") for at, i in places.items()]
    y_axis = charts.axis(reach(comparison.cells), "top-1, %", unit=PERCENT)
    x_axis = charts.Axis(low, high, ticks, "sparsity, %")
    return Figure(lines, x_axis, y_axis)


def strips(comparison: Comparison) -> dict[tuple[str, float], Markup]:
    """Draw every cell's values; a column's cells share their scale."""
    made = {}
    for at in comparison.sparsities:
        column = {name: row[at] for name, row in comparison.rows.items() if at in row}
        ends = reach(column.values())
        span = charts.Span(min(ends), max(ends))
        for name, cell in column.items():
            made[name, at] = charts.strip(cell.values, cell.interval, span)
    return made


def curves(results: Sequence[Result], look: Styles) -> list[Panel]:
    """Draw validation top-1 against epoch: the teacher, then each criterion beside dense."""
    trained = [result for result in results if result.epochs]
    if not trained:
        return []
    tuned = [result for result in trained if result.kind != "train"]
    dense = [result for result in tuned if not result.pruned]
    groups = {"teacher": [result for result in trained if result.kind == "train"]}
    for at in sorted({result.sparsity for result in tuned if result.pruned}):
        level = [result for result in tuned if result.pruned and result.sparsity == at]
        for title, names in families(result.way for result in level).items():
            own = [result for result in level if result.way in names]
            groups[f"{title}, {100 * at:.4g} % sparsity"] = dense + own
    if len(groups) == 1:
        groups["dense"] = dense
    axes = _curve_axes([epoch for result in trained for epoch in result.epochs])
    return [Panel(title, _curves(group, look, axes)) for title, group in groups.items() if group]


Axes = tuple[charts.Axis, charts.Axis]


def _curve_axes(epochs: Sequence[Mapping[str, Any]]) -> Axes:
    """Return the axes that all curves share, so that panels can be compared."""
    tops = [epoch["top1"] for epoch in epochs]
    ends = [min(*tops, max(tops) - PERCENT), max(tops)]
    last = max(epoch["epoch"] for epoch in epochs)
    return charts.whole_axis(1, last, "epoch"), charts.axis(ends, "top-1, %", unit=PERCENT)


def _curves(results: Sequence[Result], look: Styles, axes: Axes) -> Markup:
    lines = [
        charts.Line(
            result.name,
            look[result.way],
            [epoch["epoch"] for epoch in result.epochs],
            [epoch["top1"] for epoch in result.epochs],
            dots=len(result.epochs) == 1,
        )
        for result in results
    ]
    return charts.lines(lines, *axes, "validation top-1 against epoch")


def densities(masks: Mapping[str, MaskSet], named: Mapping[str, str], look: Styles) -> list[Panel]:
    """Draw the density of every layer of every mask, a panel for each sparsity and criterion.

    `named` are the masks' ways.
    """
    rows = {name: [layer.density for layer in mask.layers()] for name, mask in masks.items()}
    positive = [density for row in rows.values() for density in row if density]
    y_axis = charts.share_decades(min(positive, default=1.0), "density, %")
    found = []
    for at in sorted({sparsity(mask) for mask in masks.values()}):
        level = [name for name, mask in masks.items() if sparsity(mask) == at]
        for title, names in families(named[name] for name in level).items():
            own = {name: rows[name] for name in level if named[name] in names}
            lines = [_density(name, row, look[named[name]], y_axis) for name, row in own.items()]
            x_axis = charts.whole_axis(1, max(map(len, own.values())), "layer, first to last")
            chart = charts.lines(lines, x_axis, y_axis, "density of every layer")
            found.append(Panel(f"{title}, {100 * at:.4g} % sparsity", chart))
    return found


def _density(name: str, row: Sequence[float], css: str, y_axis: charts.Axis) -> charts.Line:
    return charts.Line(
        name,
        css,
        range(1, len(row) + 1),
        [max(density, y_axis.low) for density in row],
        hollow=[not density for density in row],
        dots=len(row) <= 24,
    )
