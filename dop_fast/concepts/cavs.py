"""Concept activation vectors, TCAV scores (Eq. 5) and their significance.

A separator of 2n rows in d dimensions is a combination of the rows, so everything here happens
in the 2n dimensions of their Gram matrix, for all random sets at once; no vector of length d is
ever formed.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from torch import Tensor

Floats = NDArray[np.float64]

RIDGE = 1.0
"""Ridge penalty, in units of the rows' mean squared distance from their mean.

Over 5 classes of CIFAR-10, of 0.01, 0.1, 1 and 10 this ranks concepts most like the published SGD
(Spearman 0.95, two sets of SGD runs among themselves 0.97) and separates held-out rows best.
"""

PART = 2048
"""Dimensions whose products in bfloat16 are summed before they are rounded."""


@dataclass(frozen=True)
class RandomSets:
    """Random sets `rows` [s n d] beside the class's `gradients` [t d], of the same type.

    `gram` float64[s n n] and `along` float64[t s n] are what they have in common with every
    concept of the class.
    """

    rows: Tensor
    gradients: Tensor
    gram: Floats
    along: Floats


def hold(rows: Tensor, gradients: Tensor) -> RandomSets:
    """Prepare random sets [s n d], float32 or bfloat16, to hold concepts against."""
    gradients = gradients.to(rows.dtype)
    gram = np.stack([products(part, part) for part in rows])
    along = products(gradients, rows.flatten(0, 1)).reshape(-1, *rows.shape[:2])
    return RandomSets(rows, gradients, gram, along)


def products(one: Tensor, other: Tensor) -> Floats:
    """Return the inner products of rows [a d] with rows [b d], float64[a b].

    Those of bfloat16 are summed in parts: torch rounds a product of matrices to their own type.
    """
    if one.dtype != torch.bfloat16:
        return _float64(one @ other.T)
    total = torch.zeros((len(one), len(other)), device=one.device)
    for start in range(0, one.shape[1], PART):
        total += one[:, start : start + PART] @ other[:, start : start + PART].T
    return _float64(total)


def tcav(concept: Tensor, against: RandomSets, cav: str, seed: int) -> tuple[Floats, float]:
    """Return the TCAV score of `concept` [q d] for each random set, and CAV accuracy.

    Eq. 5: the share of the class's images whose gradient has a positive component along the CAV,
    which points toward the concept. The larger of concept and set is cut to the smaller's count.
    """
    sets, size, width = against.rows.shape
    n = min(len(concept), size)
    concept = concept[:n]
    gram = np.empty((sets, 2 * n, 2 * n))
    gram[:, :n, :n] = products(concept, concept)
    cross = products(concept, against.rows.reshape(sets * size, width))
    gram[:, :n, n:] = cross.reshape(n, sets, size)[..., :n].swapaxes(0, 1)
    gram[:, n:, :n] = gram[:, :n, n:].swapaxes(1, 2)
    gram[:, n:, n:] = against.gram[:, :n, :n]
    dual, accuracy = ridge(gram) if cav == "ridge" else sgd(gram, seed)
    toward = products(against.gradients, concept) @ dual[:, :n].T
    slope = toward + np.einsum("tsn,sn->ts", against.along[..., :n], dual[:, n:])
    return (slope > 0).mean(axis=0), float(accuracy.mean())


def ridge(gram: Floats) -> tuple[Floats, Floats]:
    """Separate each half of `gram` [s 2n 2n] by ridge regression on labels +1 and -1.

    Returns dual coefficients [s 2n], by which to combine the rows, and leave-one-out accuracies
    [s]. With an intercept that is not penalised, so a shift of all rows changes nothing.
    """
    count = gram.shape[1]
    labels = np.repeat([1.0, -1.0], count // 2)
    centred = gram - gram.mean(axis=1, keepdims=True)
    centred -= centred.mean(axis=2, keepdims=True)
    spread = np.trace(centred, axis1=1, axis2=2) / count
    rounding = 1e-9 * np.trace(gram, axis1=1, axis2=2) / count  # all that is left of equal rows
    penalty = np.maximum(RIDGE * spread, rounding + 1e-30)
    inverse = np.linalg.inv(centred + penalty[:, None, None] * np.eye(count))
    dual = inverse @ labels
    # 1 - the hat matrix with intercept is penalty * inverse - 1/count, and what is left of a
    # label after leaving it out is its residual over that diagonal
    own = penalty[:, None] * np.diagonal(inverse, axis1=1, axis2=2) - 1 / count
    return dual, (labels * penalty[:, None] * dual / own < 1).mean(axis=1)


def sgd(gram: Floats, seed: int) -> tuple[Floats, Floats]:
    """Separate as published: a linear SVM by SGD on 67 % of the rows, accuracy on 33 %.

    SGD sees the rows only through their inner products, so coordinates in the rows' own span
    give the published separator without its d dimensions. Returns as `ridge`.
    """
    labels = np.repeat([1, 0], gram.shape[1] // 2)
    duals, accuracies = [], []
    for number, one in enumerate(gram):
        values, vectors = np.linalg.eigh(one)
        lengths = np.sqrt(np.maximum(values, 0))
        state = (seed + number) % 2**32
        rows = vectors * lengths
        x, x_test, y, y_test = train_test_split(
            rows, labels, test_size=0.33, stratify=labels, random_state=state
        )
        model = SGDClassifier(alpha=0.01, max_iter=1000, tol=1e-3, random_state=state)
        with warnings.catch_warnings():  # 1000 epochs are what was published, converged or not
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        spans = lengths > lengths.max() * 1e-6
        duals.append((vectors[:, spans] / lengths[spans]) @ model.coef_[0, spans])
        accuracies.append(model.score(x_test, y_test))
    return np.stack(duals), np.array(accuracies)


def p_value(runs: Floats, null: Floats) -> float:
    """Return the p-value of `runs` [s] not exceeding `null` [s]: a one-sided paired t-test.

    Where all differences are equal the test is not defined: 0 if they are positive, else 1. It
    asks whether other random sets would give the same verdict, not whether other segments would:
    a handful of random segments passes far more often than the level says.
    """
    difference = runs - null
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    if error < 1e-9:  # scores are shares of a few images: less is rounding
        return 0.0 if mean > 1e-9 else 1.0
    return float(stats.t.sf(mean / error, len(difference) - 1))


def _float64(values: Tensor) -> Floats:
    return values.to("cpu", torch.float64).numpy()
