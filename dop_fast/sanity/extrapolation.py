"""How many items a stable mask needs: the split-half cosine against the number of items.

Model: scores of N items are a signal plus noise of variance 1/N, independent in the two halves.
Their cosine is then N / (N + c), with c the number of items at which noise is as strong as signal.
Where scores are not linear in the items (SNIP's absolute values, GraSP's product of two means) it
need not hold, so it comes with its error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import optimize

BAD = 0.05
"""In the middle of the curve, d cosine = d log(c) / 4: c is then wrong by a fifth or more."""
FAR = 10.0
MOST = 1e9
"""Items; what needs more shows no signal."""


@dataclass(frozen=True)
class Needed:
    """Items in a half at which the cosine reaches `target`: NaN, or infinite without a signal.

    `measured`: between two sizes that were measured, not extrapolated. `c` is the model's, `error`
    its largest distance to a measured mean (NaN of a single size), `low` and `high` what single
    splits give, `largest` the most items of a half that were measured.
    """

    target: float
    items: float
    measured: bool
    c: float
    error: float
    low: float
    high: float
    largest: int

    @property
    def bad(self) -> bool:
        """Whether the model misses what was measured."""
        return self.error > BAD

    @property
    def far(self) -> bool:
        """Whether it lies more than ten times beyond what was measured."""
        return not self.measured and self.items > FAR * self.largest

    def to_dict(self) -> dict[str, float | bool | str | None]:
        """Return plain values for JSON, None for what is infinite or not a number."""
        values = {**asdict(self), "bad": self.bad, "far": self.far, "text": self.text()}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    def text(self) -> str:
        """Say it plainly."""
        if math.isinf(self.items):
            return f"no signal: the cosine does not rise above 0 up to {self.largest:,} items"
        if self.measured:
            return f"{_round(self.items)} (measured)"
        by_split = f"; {_round(self.low)} to {_round(self.high)} by split"
        said = f"{_round(self.items)} (extrapolated{by_split * (self.low != self.high)})"
        if math.isnan(self.error):
            said += "; one size alone, so nothing checks the model"
        if self.bad:
            said += (
                f"; not to be trusted: N/(N+c) misses what was measured by up to {self.error:.2f}"
            )
        if self.far:
            said += f"; a guess, {self.items / self.largest:.0f} times what was measured"
        return said


def needed(curves: Sequence[Mapping[int, float]], target: float) -> Needed:
    """Return how many items a half needs, from the cosine by items of each split.

    Where the mean reaches the target at a size and stays above it, that is it, or lies between it
    and the size before (interpolated over log N); else the model is extrapolated.
    """
    sizes = sorted({size for curve in curves for size in curve})
    means = [float(np.mean([curve[n] for curve in curves if n in curve])) for n in sizes]
    c = fit(dict(zip(sizes, means, strict=True)))
    model = [n / (n + c) for n in sizes]
    error = max(abs(y - m) for y, m in zip(means, model, strict=True))
    alone = [_from(fit(curve), target) for curve in curves]
    found = _reached(sizes, means, target)
    return Needed(
        target,
        _from(c, target) if math.isnan(found) else found,
        not math.isnan(found),
        c,
        error if len(sizes) > 1 else math.nan,
        min(alone),
        max(alone),
        sizes[-1],
    )


def fit(cosines: Mapping[int, float]) -> float:
    """Return the c of N / (N + c) that is nearest to the cosines by N, infinite without signal."""
    sizes, values = np.array(list(cosines), float), np.array(list(cosines.values()))

    def error(log_c: float) -> float:
        return float(np.square(sizes / (sizes + math.exp(log_c)) - values).sum())

    bounds = math.log(1e-6), math.log(MOST)
    found = optimize.minimize_scalar(error, bounds=bounds, options={"xatol": 1e-9})
    return math.inf if values.mean() <= 0 else math.exp(found.x)


def _from(c: float, target: float) -> float:
    return c * target / (1 - target)


def _reached(sizes: Sequence[int], means: Sequence[float], target: float) -> float:
    below = [i for i, mean in enumerate(means) if not mean >= target]
    first = below[-1] + 1 if below else 0
    if first == len(sizes):
        return math.nan
    if first == 0:
        return float(sizes[0])
    share = (target - means[first - 1]) / (means[first] - means[first - 1])
    return float(sizes[first - 1] * (sizes[first] / sizes[first - 1]) ** share)


def _round(items: float) -> str:
    """Write two figures of a number of items."""
    if math.isinf(items):
        return "no end"
    digits = max(0, math.floor(math.log10(items)) - 1) if items >= 1 else 0
    return f"{round(items / 10**digits) * 10**digits:,}"
