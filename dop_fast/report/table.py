"""Numbers of the report: accuracies with their intervals, and how far masks agree."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dop_fast.masks import MaskSet
from dop_fast.runs import Run, metrics

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Result:
    """One finished training and its epochs; without a criterion it is dense."""

    name: str
    kind: str
    criterion: str | None
    material: str | None
    sparsity: float
    seed: int
    top1: float
    top5: float
    epochs: Sequence[Mapping[str, Any]]
    unreadable: tuple[str, ...]

    @property
    def series(self) -> str:
        """Name the way of pruning, whatever the sparsity and the seed."""
        return series(self.criterion, self.material)

    @property
    def pruned(self) -> bool:
        """Whether it was trained with a mask."""
        return self.criterion is not None

    @property
    def time_s(self) -> float:
        """The time its epochs took."""
        return math.fsum(epoch["time_s"] for epoch in self.epochs)


def result(run: Run) -> Result:
    """Read what a finished run says of itself."""
    about = run.about.facts
    return Result(
        name=run.name,
        kind=run.about.kind,
        criterion=about.get("criterion"),
        material=about.get("material"),
        sparsity=about.get("sparsity", 0.0),
        seed=about["seed"],
        top1=run.result["top1"],
        top5=run.result["top5"],
        epochs=metrics(run.folder),
        unreadable=tuple(run.result.get("unreadable", ())),
    )


def series(criterion: str | None, material: str | None) -> str:
    """Name a way of pruning; a criterion that needs no data stands alone."""
    if criterion is None:
        return "dense"
    return criterion if material in (None, "", "none") else f"{criterion} · {material}"


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
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error, given)


@dataclass(frozen=True)
class Comparison:
    """Top-1 by way of pruning (rows) and sparsity (columns), over seeds."""

    sparsities: tuple[float, ...]
    rows: dict[str, dict[float, Estimate]]
    dense: Estimate | None

    def best(self, sparsity: float) -> str:
        """Return the row with the highest mean at this sparsity."""
        means = {name: row[sparsity].mean for name, row in self.rows.items() if sparsity in row}
        return max(means, key=means.__getitem__)

    @property
    def cells(self) -> list[Estimate]:
        """Every estimate, dense too."""
        return [cell for row in self.rows.values() for cell in row.values()] + (
            [self.dense] if self.dense else []
        )


def compare(results: Sequence[Result]) -> Comparison:
    """Gather the fine-tunings' top-1."""
    tuned = [result for result in results if result.kind == "finetune"]
    pruned = [result for result in tuned if result.pruned]
    tops: dict[str, dict[float, list[float]]] = {}
    for result in sorted(pruned, key=lambda result: (result.series, result.sparsity, result.seed)):
        tops.setdefault(result.series, {}).setdefault(result.sparsity, []).append(result.top1)
    dense = [result.top1 for result in tuned if not result.pruned]
    return Comparison(
        tuple(sorted({result.sparsity for result in pruned})),
        {name: {at: estimate(seeds) for at, seeds in row.items()} for name, row in tops.items()},
        estimate(dense) if dense else None,
    )


@dataclass(frozen=True)
class Overlap:
    """Jaccard index of every pair of masks of one sparsity, float64[m m]."""

    sparsity: float
    names: tuple[str, ...]
    jaccard: NDArray[np.float64]
    by_chance: float


def sparsity(mask: MaskSet) -> float:
    """Return the sparsity that was asked for, or the one there is."""
    return float(mask.about.get("sparsity", round(mask.sparsity, 4)))


def overlaps(masks: Mapping[str, MaskSet]) -> list[Overlap]:
    """Compare masks of the same weights and sparsity, lowest sparsity first."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, mask in masks.items():
        shapes = tuple((layer, tuple(kept.shape)) for layer, kept in mask.masks.items())
        groups.setdefault((sparsity(mask), shapes), []).append(name)
    return [
        _overlap(key[0], names, masks)
        for key, names in sorted(groups.items(), key=lambda group: group[0][0])
        if len(names) > 1
    ]


def _overlap(at: float, names: list[str], masks: Mapping[str, MaskSet]) -> Overlap:
    bits = [_packed(masks[name]) for name in names]
    kept = [_count(mask) for mask in bits]
    matrix = np.eye(len(names))
    for i in range(len(names)):
        for j in range(i):
            both = _count(bits[i] & bits[j])
            matrix[i, j] = matrix[j, i] = both / (kept[i] + kept[j] - both)
    density = 1 - at
    return Overlap(at, tuple(names), matrix, density / (2 - density))


def _packed(mask: MaskSet) -> NDArray[np.uint8]:
    """Return all weights' bits, so that a pair of large masks takes milliseconds."""
    return np.concatenate([np.packbits(layer.numpy().ravel()) for layer in mask.masks.values()])


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
