"""Over seeds: mean, standard deviation, Student's t interval, and differences seed by seed."""

import math
from collections.abc import Mapping

import numpy as np

from dop_fast.report.table import Estimate, estimate

BySeed = Mapping[int, float]
"""One figure of each seed."""


def deviation(values: Estimate) -> float:
    """Return the standard deviation with n - 1 degrees of freedom; NaN where n is 1."""
    return float(np.std(values.values, ddof=1)) if values.n > 1 else math.nan


def over_seeds(figures: BySeed) -> Estimate | None:
    """Return the mean with its 95 % interval; None where no seed is done."""
    return estimate(figures[seed] for seed in sorted(figures)) if figures else None


def paired(ours: BySeed, baseline: BySeed) -> Estimate | None:
    """Return the mean of `ours - baseline` over the seeds that both have, with its 95 % interval.

    The same seed draws the same initial weights and the same order of training images, so what
    they have in common drops out. None where no seed is in both.
    """
    return over_seeds({seed: ours[seed] - baseline[seed] for seed in ours.keys() & baseline.keys()})
