"""Charts as inline SVG: colours come from the page's style sheet, so they follow its theme."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 38, 16, 24, 38
DIGIT = 7.5
"""Width of a character, as far as it can be known here."""


@dataclass(frozen=True)
class Line:
    """One series of points, coloured by its CSS classes; `half` draws error bars.

    A point that is `hollow` has no place on the axis and is drawn at its end as a ring.
    """

    name: str
    css: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] = ()
    hollow: Sequence[bool] = ()
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """The range shown and its labelled ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str = ""
    log: bool = False

    def at(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high end."""
        if self.log:
            value, low, high = math.log10(value), math.log10(self.low), math.log10(self.high)
            return (value - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def axis(values: Sequence[float], title: str, unit: float = 1.0) -> Axis:
    """Return an axis from tick to tick around the values, labelled in `unit`s."""
    low, high = min(values) / unit, max(values) / unit
    step = _round_step(high - low)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    ticks = [(i * step * unit, _number(i * step, step)) for i in range(first, last + 1)]
    return Axis(ticks[0][0], ticks[-1][0], ticks, title)


def whole_axis(low: int, high: int, title: str) -> Axis:
    """Return an axis of whole numbers that ends where they end."""
    high = max(high, low + 1)
    step = max(1, round(_round_step(high - low)))
    clear = (high - low) / 10  # of the labels at both ends
    within = [i for i in range(low, high) if i % step == 0 and low + clear <= i <= high - clear]
    ticks = [(i, str(i)) for i in (low, *within, high)]
    return Axis(low, high, ticks, title)


def _round_step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, about a fifth of the span."""
    rough = (span or 1.0) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _number(value: float, step: float) -> str:
    return f"{value:.{max(0, -math.floor(math.log10(step)))}f}"


def share_decades(lowest: float, title: str) -> Axis:
    """Return a logarithmic axis in percent, from a power of ten up to 100 %."""
    first = min(math.floor(math.log10(lowest)), -1)
    ticks = [(10.0**power, f"{100 * 10.0**power:g}") for power in range(first, 1)]
    return Axis(ticks[0][0], 1.0, ticks, title, log=True)


@dataclass
class _Canvas:
    """Collects SVG elements in the coordinates of two axes."""

    x_axis: Axis
    y_axis: Axis
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        return LEFT + self.x_axis.at(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y_axis.at(value) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> None:
        for value, label in self.y_axis.ticks:
            y = self.y(value)
            self.parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            self.parts.append(
                f'<text class="y" x="{LEFT - 7}" y="{y + 4:.1f}">{escape(label)}</text>'
            )
        free = 0.0
        for value, label in self.x_axis.ticks:
            x, y, half = self.x(value), HEIGHT - BOTTOM + 17, DIGIT * len(label) / 2
            if x - half < free:  # it would touch the label before it
                continue
            free = x + half + DIGIT
            self.parts.append(f'<text class="x" x="{x:.1f}" y="{y}">{escape(label)}</text>')
        x_title, y_title = escape(self.x_axis.title), escape(self.y_axis.title)
        middle = (LEFT + WIDTH - RIGHT) / 2
        self.parts.append(f'<text class="x title" x="{middle}" y="{HEIGHT - 4}">{x_title}</text>')
        self.parts.append(f'<text class="title" x="2" y="11">{y_title}</text>')

    def svg(self, label: str) -> Markup:
        head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        return Markup(f'{head} aria-label="{escape(label)}">{"".join(self.parts)}</svg>')


def lines(series: Sequence[Line], x_axis: Axis, y_axis: Axis, label: str) -> Markup:
    """Draw series of points joined by lines."""
    canvas = _Canvas(x_axis, y_axis)
    canvas.grid()
    for line in series:
        canvas.parts.append(_line(canvas, line))
    return canvas.svg(label)


def _line(canvas: _Canvas, line: Line) -> str:
    points = [(canvas.x(x), canvas.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [f'<path class="line" d="{path}"/>']
    for (x, _), mean, half in zip(points, line.y, line.half, strict=False):
        if not math.isnan(half):
            bottom = max(mean - half, canvas.y_axis.low)  # cut where the plot ends
            ends = f"{canvas.y(bottom):.1f}V{canvas.y(min(mean + half, canvas.y_axis.high)):.1f}"
            parts.append(f'<path class="bar" d="M{x:.1f} {ends}"/>')
    for i, (x, y) in enumerate(points):
        hollow = bool(line.hollow) and line.hollow[i]
        if line.dots or hollow:
            css = ' class="hollow"' if hollow else ""
            parts.append(f'<circle{css} cx="{x:.1f}" cy="{y:.1f}" r="{4 if hollow else 2.6}"/>')
    return f'<g class="{line.css}"><title>{escape(line.name)}</title>{"".join(parts)}</g>'


def histogram(values: Iterable[float], mark: float, mark_label: str) -> Markup:
    """Draw how many values fall in each of 20 bins of [0, 1], with a vertical mark."""
    counts, edges = np.histogram(list(values), bins=20, range=(0, 1))
    shares = Axis(0, 1, [(v / 4, f"{25 * v}") for v in range(5)], "coverage r, % of the pixels")
    canvas = _Canvas(shares, axis([0, int(counts.max())], "patches"))
    canvas.grid()
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x, width, y = canvas.x(left) + 1, canvas.x(right) - canvas.x(left) - 2, canvas.y(count)
            size = f'width="{width:.1f}" height="{canvas.y(0) - y:.1f}"'
            text = f"<title>{count} with {left:.0%} to {right:.0%}</title>"
            canvas.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="1.5">{text}</rect>')
    x = canvas.x(mark)
    canvas.parts.append(f'<path class="mark" d="M{x:.1f} {TOP - 6}V{HEIGHT - BOTTOM}"/>')
    note = f'<text class="y mark" x="{x - 6:.1f}" y="{TOP + 4}">{escape(mark_label)}</text>'
    canvas.parts.append(note)
    return canvas.svg("histogram of the coverage of stitched patches")


@dataclass(frozen=True)
class Span:
    """The range of a strip, and a value in it that is worth a tick."""

    low: float
    high: float
    tick: float | None = None


def strip(values: Iterable[float], interval: tuple[float, float] | None, span: Span) -> Markup:
    """Draw the values as dots on one line, their mean as a bar, and an interval behind them."""
    width, height, edge = 150, 16, 6
    given = list(values)

    def at(value: float) -> str:
        share = (min(max(value, span.low), span.high) - span.low) / ((span.high - span.low) or 1.0)
        return f"{edge + share * (width - 2 * edge):.1f}"

    parts = [f'<path class="rule" d="M{edge} 8H{width - edge}"/>']
    if span.tick is not None:
        parts.append(f'<path class="rule" d="M{at(span.tick)} 4V12"/>')
    if interval is not None:
        parts.append(f'<path class="span" d="M{at(interval[0])} 8H{at(interval[1])}"/>')
    dots = "".join(f"M{at(value)} 8h0" for value in given)  # round caps: shorter than circles
    parts.append(f'<path class="dots" d="{dots}"/>')
    parts.append(f'<path class="mean" d="M{at(sum(given) / len(given))} 3V13"/>')
    return Markup(
        f'<svg class="strip" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )
