"""Numbers of the report: accuracies with their intervals, and how far masks agree."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dop_fast.masks import MaskSet
from dop_fast.runs import Run, metrics

CONFIDENCE = 0.95
PLACES = 4
"""Of a sparsity: a mask like another has that one's, which is of whole weights."""


@dataclass(frozen=True)
class Result:
    """One finished training and its epochs; `way`: how it was pruned, see `ways`."""

    name: str
    kind: str
    way: str
    pruned: bool
    sparsity: float
    seed: int
    top1: float
    top5: float
    epochs: Sequence[Mapping[str, Any]]
    unreadable: tuple[str, ...]

    @property
    def time_s(self) -> float:
        """The time its epochs took."""
        return math.fsum(epoch["time_s"] for epoch in self.epochs)


def result(run: Run, way: str) -> Result:
    """Read what a finished run says of itself."""
    about = run.about.facts
    return Result(
        name=run.name,
        kind=run.about.kind,
        way=way,
        pruned=about.get("criterion") is not None,
        sparsity=round(about.get("sparsity", 0.0), PLACES),
        seed=about["seed"],
        top1=run.result["top1"],
        top5=run.result["top5"],
        epochs=metrics(run.folder),
        unreadable=tuple(run.result.get("unreadable", ())),
    )


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its 95 % interval; NaN where one value tells no spread."""

    mean: float
    half: float
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many values it rests on."""
        return len(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval, None where there is none."""
        return None if math.isnan(self.half) else (self.mean - self.half, self.mean + self.half)


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean and Student's t interval of one or more values."""
    given = tuple(values)
    n = len(given)
    mean = math.fsum(given) / n
    if n == 1:
        return Estimate(mean, math.nan, given)
    error = float(np.std(given, ddof=1)) / math.sqrt(n)
    return Estimate(mean, _quantile(n - 1) * error, given)


@cache  # SciPy's takes most of an estimate's time
def _quantile(freedom: int) -> float:
    """Return Student's t, two-sided, at `CONFIDENCE`."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


@dataclass(frozen=True)
class Comparison:
    """Top-1 by way of pruning (rows) and sparsity (columns), over seeds; `dense` by its name."""

    sparsities: tuple[float, ...]
    rows: dict[str, dict[float, Estimate]]
    dense: dict[str, Estimate]

    def best(self, sparsity: float) -> str:
        """Return the row with the highest mean at this sparsity."""
        means = {name: row[sparsity].mean for name, row in self.rows.items() if sparsity in row}
        return max(means, key=means.__getitem__)

    @property
    def cells(self) -> list[Estimate]:
        """Every estimate, dense too."""
        return [cell for row in self.rows.values() for cell in row.values()] + [
            *self.dense.values()
        ]

    def of(self, names: Iterable[str]) -> "Comparison":
        """Return the same with these rows alone."""
        return replace(self, rows={name: self.rows[name] for name in names})


def compare(results: Sequence[Result]) -> Comparison:
    """Gather the fine-tunings' top-1; of runs that differ in nothing but the name, the last."""
    found: dict[tuple[bool, str, float], dict[int, float]] = {}
    for one in sorted(results, key=lambda one: (one.way, one.sparsity, one.seed)):
        if one.kind == "finetune":
            found.setdefault((one.pruned, one.way, one.sparsity), {})[one.seed] = one.top1
    rows: dict[str, dict[float, Estimate]] = {}
    dense: dict[str, Estimate] = {}
    for (pruned, way, at), seeds in found.items():
        if pruned:
            rows.setdefault(way, {})[at] = estimate(seeds.values())
        else:
            dense[way] = estimate(seeds.values())
    return Comparison(tuple(sorted({at for row in rows.values() for at in row})), rows, dense)


@dataclass(frozen=True)
class Overlap:
    """Mean Jaccard index of every pair of ways at one sparsity, float64[w w], over `n` networks.

    Masks are compared where they are of the same initial weights; NaN where two ways have none.
    """

    sparsity: float
    names: tuple[str, ...]
    jaccard: NDArray[np.float64]
    by_chance: float
    n: int


def sparsity(mask: MaskSet) -> float:
    """Return the sparsity that was asked for, or the one there is, to `PLACES`."""
    return round(float(mask.about.get("sparsity", mask.sparsity)), PLACES)


def overlaps(masks: Mapping[str, MaskSet], ways: Mapping[str, str]) -> list[Overlap]:
    """Compare the masks of each sparsity, lowest first, where there are two ways or more."""
    groups: dict[float, dict[Any, dict[str, MaskSet]]] = {}
    for name, mask in masks.items():
        shapes = tuple((layer, tuple(kept.shape)) for layer, kept in mask.masks.items())
        network = (mask.about.get("init"), shapes)
        groups.setdefault(sparsity(mask), {}).setdefault(network, {})[ways[name]] = mask
    found = [_overlap(at, list(networks.values())) for at, networks in sorted(groups.items())]
    return [overlap for overlap in found if len(overlap.names) > 1]


def _overlap(at: float, networks: Sequence[Mapping[str, MaskSet]]) -> Overlap:
    names = tuple(sorted({name for masks in networks for name in masks}))
    found: dict[tuple[int, int], list[float]] = {}
    for masks in networks:
        bits = {name: _packed(mask) for name, mask in masks.items()}
        for (i, one), (j, other) in combinations(enumerate(names), 2):
            if one in bits and other in bits:
                found.setdefault((i, j), []).append(_jaccard(bits[one], bits[other]))
    matrix = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(matrix, 1)
    for (i, j), values in found.items():
        matrix[i, j] = matrix[j, i] = np.mean(values)
    density = 1 - at
    most = max(map(len, found.values()), default=0)
    return Overlap(at, names, matrix, density / (2 - density), most)


def _jaccard(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    both = _count(one & other)
    return both / (_count(one) + _count(other) - both)


def _packed(mask: MaskSet) -> NDArray[np.uint8]:
    """Return all weights' bits, so that a pair of large masks takes milliseconds."""
    return np.concatenate([np.packbits(layer.numpy().ravel()) for layer in mask.masks.values()])


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
