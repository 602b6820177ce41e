"""Activations to candidate concepts: K-means, then ACE's filter of sizes and sources."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning

from dop_fast.config import ExtractConfig
from dop_fast.types import Array

SEEDED = 2000
"""Points that K-means draws its first centres among."""


@dataclass(frozen=True)
class Cluster:
    """Segments close together: the nearest `members` int32[q], and facts about all of them.

    `size`: segments; `sources`: images they come from; `cost`: mean distance to the centre.
    """

    members: Array
    size: int
    sources: int
    cost: float


def cluster(pooled: Array, image: Array, config: ExtractConfig, seed: int) -> list[Cluster]:
    """Group `pooled` float32[m c] of segments from `image` int[m] into popular clusters.

    There is at most one cluster for each `min_members` segments, so that a small class still has
    one that is large enough. Where none is popular, the ones with the most sources stand in.
    K-means is scikit-learn's with one start; Elkan's bounds change its time alone.
    """
    count = max(1, min(config.clusters, len(pooled) // config.min_members))
    means = KMeans(count, init=_starts, n_init=1, algorithm="elkan", random_state=seed % 2**32)
    with warnings.catch_warnings():  # fewer distinct points than clusters: some stay empty
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = means.fit_predict(pooled)
    distance = np.linalg.norm(pooled - means.cluster_centers_[labels], axis=1)
    found = [
        _cluster(np.flatnonzero(labels == label), distance, image, config.max_members)
        for label in range(count)
    ]
    images = len(np.unique(image))
    large = [group for group in found if group.size >= config.min_members]
    chosen = [group for group in large if popular(group.size, group.sources, images)]
    if chosen:
        return chosen
    spread = [group for group in found if group.size >= 2]  # a separator needs two
    return sorted(spread, key=lambda group: (-group.sources, group.cost))[: config.top]


def _starts(points: Array, count: int, random_state: np.random.RandomState) -> Array:
    """Return k-means++ centres among some of the points: of them all it takes as long as the rest.

    On 5,838 segments the final cost is the same, to less than two seeds differ.
    """
    some = random_state.permutation(len(points))[: max(SEEDED, count)]
    centres: Array = kmeans_plusplus(points[some], count, random_state=random_state)[0]
    return centres


def _cluster(inside: NDArray[np.intp], distance: Array, image: Array, keep: int) -> Cluster:
    nearest = inside[np.argsort(distance[inside], kind="stable")]
    cost = float(distance[inside].mean()) if len(inside) else 0.0
    members = nearest[:keep].astype(np.int32)
    return Cluster(members, len(inside), len(np.unique(image[inside])), cost)


def popular(size: int, sources: int, images: int) -> bool:
    """Return whether enough of a class's `images` share a cluster, by ACE's three rules."""
    return (
        sources > 0.5 * size
        or (sources > 0.25 * size and sources > 0.25 * images)
        or (sources > 0.1 * size and sources > 0.5 * images)
    )
