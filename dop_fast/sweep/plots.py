"""Accuracy against sparsity as one file: an SVG that needs no page around it, and a PNG."""

import math
import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise

from markupsafe import escape
from PIL import Image, ImageDraw, ImageFont

from dop_fast.report import charts
from dop_fast.report.plots import Figure, Styles, accuracy_figure, styles
from dop_fast.report.table import Comparison

LEGEND, SCALE, FINER = 17, 2, 3
"""Pixels of a line of the legend; PNG pixels of an SVG one; and how much finer it is drawn."""
DASH, GAP = 6, 4


def draw(comparison: Comparison) -> tuple[str, Image.Image]:
    """Return the plot of one or more finished rows as SVG and as RGB image."""
    look = styles([*sorted(comparison.rows), *comparison.dense])
    figure = accuracy_figure(comparison, look)
    return svg(figure, look), png(figure)


def svg(figure: Figure, look: Styles) -> str:
    """Return a whole SVG file: the report's chart and style, and a legend below."""
    chart = str(charts.lines(*figure, "top-1 accuracy against sparsity"))
    chart = chart.replace('class="chart"', f'class="chart" height="{charts.HEIGHT}"', 1)
    height = charts.HEIGHT + LEGEND * len(figure.lines) + 8
    legend = []
    for i, line in enumerate(figure.lines):
        y = charts.HEIGHT + LEGEND * (i + 0.5)
        path = f'<path class="line" d="M{charts.LEFT} {y}h22"/>'
        name = f'<text class="name" x="{charts.LEFT + 30}" y="{y + 4}">{escape(line.name)}</text>'
        legend.append(f'<g class="{look[line.name]}">{path}</g>{name}')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{SCALE * charts.WIDTH}" '
        f'viewBox="0 0 {charts.WIDTH} {height}">\n<style>{_style()}</style>\n'
        f'<rect class="paper" width="100%" height="100%"/>{chart}{"".join(legend)}</svg>\n'
    )


def _sheet() -> str:
    return files("dop_fast").joinpath("templates/report.css").read_text(encoding="utf-8")


def _style() -> str:
    """Return the rules of the report's style sheet that its charts need."""
    sheet = _sheet()
    rules = re.findall(r"^(?:svg|\.chart (?:text|\.)|\.s\d|\.dense \{|\.dashed).*$", sheet, re.M)
    own = ".chart { font-family: var(--sans); } .chart .name { fill: var(--ink); }"
    return "\n".join(
        [sheet[: sheet.index("* {")], *rules, own, "svg .paper { fill: var(--paper); }"]
    )


def _colours() -> dict[str, str]:
    """Return the colours of the light theme, which the style sheet names first."""
    found: dict[str, str] = {}
    for name, colour in re.findall(r"--(\w+): (#[0-9a-f]{6})", _sheet()):
        found.setdefault(name, colour)
    return found


def png(figure: Figure) -> Image.Image:
    """Draw the same figure as an RGB image, `SCALE` times the size of the SVG's."""
    height = charts.HEIGHT + LEGEND * len(figure.lines) + 8
    brush = _Brush(figure, height)
    brush.axes()
    for i, line in enumerate(figure.lines):
        brush.line(line)
        brush.name(line, charts.HEIGHT + LEGEND * (i + 0.5))
    size = SCALE * charts.WIDTH, SCALE * height
    return brush.image.resize(size, Image.Resampling.LANCZOS)


class _Brush:
    """Draws in the coordinates of the SVG, finer than the image that is wanted."""

    def __init__(self, figure: Figure, height: int) -> None:
        self.k, self.colours = SCALE * FINER, _colours()
        self.x_axis, self.y_axis = figure.x_axis, figure.y_axis
        size = charts.WIDTH * self.k, height * self.k
        self.image = Image.new("RGB", size, self.colours["paper"])
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(11.5 * self.k)

    def x(self, value: float) -> float:
        width = charts.WIDTH - charts.LEFT - charts.RIGHT
        return charts.LEFT + self.x_axis.at(value) * width

    def y(self, value: float) -> float:
        height = charts.HEIGHT - charts.TOP - charts.BOTTOM
        return charts.HEIGHT - charts.BOTTOM - self.y_axis.at(value) * height

    def axes(self) -> None:
        for value, label in self.y_axis.ticks:
            y, right = self.y(value), charts.WIDTH - charts.RIGHT
            self.stroke([(charts.LEFT, y), (right, y)], "rule", 1)
            self.text(charts.LEFT - 7, y, label, "rm")
        for value, label in self.x_axis.ticks:
            self.text(self.x(value), charts.HEIGHT - charts.BOTTOM + 13, label, "mm")
        middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
        self.text(middle, charts.HEIGHT - 8, self.x_axis.title, "mm")
        self.text(2, 7, self.y_axis.title, "lm")

    def line(self, line: charts.Line) -> None:
        colour, dashed = self.look(line)
        points = [(self.x(x), self.y(y)) for x, y in zip(line.x, line.y, strict=True)]
        self.stroke(points, colour, 1.5, dashed)
        for (x, _), mean, half in zip(points, line.y, line.half, strict=False):
            if not math.isnan(half):
                self.stroke([(x, self.y(mean - half)), (x, self.y(mean + half))], colour, 1.4)
        if line.dots:
            for x, y in points:
                self.pen.circle((x * self.k, y * self.k), 2.6 * self.k, self.colours[colour])

    def name(self, line: charts.Line, y: float) -> None:
        colour, dashed = self.look(line)
        self.stroke([(charts.LEFT, y), (charts.LEFT + 22, y)], colour, 1.5, dashed)
        self.text(charts.LEFT + 30, y, line.name, "lm", "ink")

    def look(self, line: charts.Line) -> tuple[str, bool]:
        colour, _, dashed = line.css.partition(" ")
        return ("muted" if colour == "dense" else colour), bool(dashed)

    def text(self, x: float, y: float, text: str, anchor: str, colour: str = "muted") -> None:
        place = x * self.k, y * self.k
        self.pen.text(place, text, self.colours[colour], self.font, anchor=anchor)

    def stroke(
        self,
        points: Sequence[tuple[float, float]],
        colour: str,
        width: float,
        dashed: bool = False,
    ) -> None:
        for start, end in pairwise(points):
            for a, b in _dashes(start, end) if dashed else [(start, end)]:
                ends = [(x * self.k, y * self.k) for x, y in (a, b)]
                self.pen.line(ends, self.colours[colour], round(width * self.k))


Point = tuple[float, float]


def _dashes(start: Point, end: Point) -> list[tuple[Point, Point]]:
    length = math.dist(start, end)

    def at(along: float) -> Point:
        share = min(along / length, 1.0)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    count = math.ceil(length / (DASH + GAP))
    return [(at(i * (DASH + GAP)), at(i * (DASH + GAP) + DASH)) for i in range(count)]
