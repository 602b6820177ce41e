"""How far two scores, or two masks, of the same weights agree, and how far they would by chance."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from dop_fast.masks import MaskSet, keep_top
from dop_fast.types import Array, Scores


@dataclass(frozen=True)
class Overlap:
    """Two masks: the Jaccard index of what they keep, and what chance gives.

    `chance`: of two random masks that keep as many, p / (2 - p) for two of density p.
    `chance_layers`: of two that are random inside each layer and keep as many of each layer as
    these do. Both are ratios of expectations, for thousands of kept weights the expected ratio.
    `moved`: the share of the kept weights that would have to change their layer to make the layers
    equally dense in both, 0 to 1.
    """

    jaccard: float
    chance: float
    chance_layers: float
    moved: float


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same weights: cosine, Spearman's rank correlation and masks' overlap.

    `cosine_layers` and `spearman_layers` are what the same figures are expected to be once the
    second scores are shuffled inside each layer, exactly: what layers alone explain. (Scores that
    are nowhere negative, such as SNIP's, have a cosine well above 0 by chance.)
    """

    cosine: float
    cosine_layers: float
    spearman: float
    spearman_layers: float
    masks: Overlap


def agreement(first: Scores, second: Scores, sparsity: float) -> Agreement:
    """Compare two scores of the same weights, in float64; NaN where one is constant."""
    sizes = [score.numel() for score in first.values()]
    a, b = _flat(first), _flat(second)
    ranks, others = (_centred(stats.rankdata(values)) for values in (a, b))
    return Agreement(
        *_cosine(a, b, sizes),
        *_cosine(ranks, others, sizes),
        overlap(keep_top(first, sparsity), keep_top(second, sparsity)),
    )


def overlap(first: MaskSet, second: MaskSet) -> Overlap:
    """Compare two masks of the same layers."""
    pairs = [(mask, second.masks[name]) for name, mask in first.masks.items()]
    size = np.array([a.numel() for a, _ in pairs], np.float64)
    kept = np.array([[int(a.sum()), int(b.sum())] for a, b in pairs], np.float64).T
    both = sum(int(torch.count_nonzero(a & b)) for a, b in pairs)
    total = kept.sum(axis=1)

    def jaccard(shared: float) -> float:
        return float(shared / (total.sum() - shared))

    return Overlap(
        jaccard(both),
        jaccard(total.prod() / size.sum()),
        jaccard((kept.prod(axis=0) / size).sum()),
        float(np.abs(kept[0] / total[0] - kept[1] / total[1]).sum() / 2),
    )


def _flat(scores: Scores) -> Array:
    return torch.cat([score.detach().flatten().cpu() for score in scores.values()]).double().numpy()


def _centred(values: Array) -> Array:
    return np.asarray(values - values.mean())


def _cosine(a: Array, b: Array, sizes: list[int]) -> tuple[float, float]:
    """Return the cosine, and its expectation once b is shuffled inside each layer."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b)) or np.nan
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(a, starts) * np.add.reduceat(b, starts)
    return float(a @ b) / norm, float((sums / sizes).sum()) / norm
