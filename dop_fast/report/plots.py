"""The report's plots: which series, axes and panels; `charts` draws them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from dop_fast.masks import MaskSet
from dop_fast.report import charts
from dop_fast.report.table import Comparison, Estimate, Result, series, sparsity

PALETTE = 8
"""Colours of the style sheet; further series take them again, dashed."""
PERCENT = 0.01


class Panel(NamedTuple):
    """A plot and its heading."""

    title: str
    chart: Markup


Styles = Mapping[str, str]
"""The CSS classes of a series, the same all over the page."""


def styles(names: Sequence[str]) -> dict[str, str]:
    """Give every series a colour, and a dash after the last colour; dense has none."""
    pruned = sorted(set(names) - {"dense"})
    made = {name: f"s{i % PALETTE}" + " dashed" * (i >= PALETTE) for i, name in enumerate(pruned)}
    return {**made, **({"dense": "dense"} if "dense" in names else {})}


def mask_series(mask: MaskSet) -> str:
    """Name the way a mask was made."""
    return series(mask.about.get("criterion", "mask"), mask.about.get("material"))


def reach(cells: Iterable[Estimate]) -> list[float]:
    """Return every value and interval end that a plot must hold."""
    return [value for cell in cells for value in (*cell.values, *(cell.interval or ()))]


class Figure(NamedTuple):
    """What a plot shows, however it is drawn."""

    lines: Sequence[charts.Line]
    x_axis: charts.Axis
    y_axis: charts.Axis


def accuracy(comparison: Comparison, look: Styles) -> Markup:
    """Draw top-1 against sparsity, one line a series, with 95 % intervals."""
    return charts.lines(*accuracy_figure(comparison, look), "top-1 accuracy against sparsity")


def accuracy_figure(comparison: Comparison, look: Styles) -> Figure:
    """Return top-1 against sparsity, one line a series, with 95 % intervals."""
    places = {at: i for i, at in enumerate(comparison.sparsities)}
    lines = [
        charts.Line(
            name,
            look[name],
            [places[at] for at in row],
            [cell.mean for cell in row.values()],
            [cell.half for cell in row.values()],
            dots=True,
        )
        for name, row in comparison.rows.items()
    ]
    low, high = -0.25, len(places) - 0.75
    if comparison.dense:
        lines.append(charts.Line("dense", look["dense"], [low, high], [comparison.dense.mean] * 2))
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
    """Draw validation top-1 against epoch: the teacher, then each sparsity beside dense."""
    trained = [result for result in results if result.epochs]
    tuned = [result for result in trained if result.kind != "train"]
    dense = [result for result in tuned if not result.pruned]
    groups = {"teacher": [result for result in trained if result.kind == "train"]}
    levels = sorted({result.sparsity for result in tuned if result.pruned})
    for at in levels:
        pruned = [result for result in tuned if result.pruned and result.sparsity == at]
        groups[f"{100 * at:.4g} % sparsity"] = dense + pruned
    if not levels:
        groups["dense"] = dense
    return [Panel(title, _curves(group, look)) for title, group in groups.items() if group]


def _curves(results: Sequence[Result], look: Styles) -> Markup:
    lines = [
        charts.Line(
            result.name,
            look[result.series],
            [epoch["epoch"] for epoch in result.epochs],
            [epoch["top1"] for epoch in result.epochs],
            dots=len(result.epochs) == 1,
        )
        for result in results
    ]
    x_axis = charts.whole_axis(0, round(max(max(line.x) for line in lines)), "epoch")
    tops = [top for line in lines for top in line.y]
    y_axis = charts.axis([*tops, min(*tops, max(tops) - PERCENT)], "top-1, %", unit=PERCENT)
    return charts.lines(lines, x_axis, y_axis, "validation top-1 against epoch")


def densities(masks: Mapping[str, MaskSet], look: Styles) -> list[Panel]:
    """Draw the density of every layer of every mask, a panel for each sparsity."""
    groups: dict[float, dict[str, MaskSet]] = {}
    for name, mask in masks.items():
        groups.setdefault(sparsity(mask), {})[name] = mask
    return [
        Panel(f"{100 * at:.4g} % sparsity", _densities(group, look))
        for at, group in sorted(groups.items())
    ]


def _densities(masks: Mapping[str, MaskSet], look: Styles) -> Markup:
    rows = {name: [layer.density for layer in mask.layers()] for name, mask in masks.items()}
    positive = [density for row in rows.values() for density in row if density]
    y_axis = charts.share_decades(min(positive), "density, %")
    lines = [
        charts.Line(
            name,
            look[mask_series(masks[name])],
            range(1, len(row) + 1),
            [max(density, y_axis.low) for density in row],
            hollow=[not density for density in row],
            dots=len(row) <= 24,
        )
        for name, row in rows.items()
    ]
    most = max(map(len, rows.values()))
    x_axis = charts.whole_axis(1, most, "prunable layer, first to last")
    return charts.lines(lines, x_axis, y_axis, "density of every layer")
