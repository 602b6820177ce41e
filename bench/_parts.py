"""What single parts of an extraction gain over the plain way to do them."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from _timing import Row, faster
from sklearn.cluster import KMeans
from torch import Tensor

from dop_fast.concepts.activations import Probe
from dop_fast.concepts.clusters import cluster
from dop_fast.concepts.features import at_once
from dop_fast.concepts.randoms import remembered
from dop_fast.config import ExtractConfig
from dop_fast.precision import autocast
from dop_fast.types import Array

Seconds: TypeAlias = Callable[[Callable[[], object], int], float]
"""Time a job: the least of some runs, the first not counted."""


def forward(probe: Probe, batch: Tensor, config: ExtractConfig, seconds: Seconds) -> Row:
    """Compare with the whole network under autocast, all images at once."""
    parts = batch.split(at_once(config, batch.shape[2], probe.device))

    def plain() -> None:
        with torch.inference_mode(), autocast(probe.device, config.amp):
            probe._model(batch)

    ours = seconds(lambda: list(probe.activations(parts)), 3) / len(batch)
    peer = seconds(plain, 3) / len(batch)
    what = f"forward of a segment, autocast in a batch of {len(batch)}"
    return faster(what, 1e3 * ours, 1e3 * peer, 1.15, unit="ms", device=probe.device.type)


def random_sets(rows: Tensor, forward_s: float, seconds: Seconds) -> Row:
    """Compare reading random sets from the disk's cache with forwards of as many segments."""
    pool = rows.cpu(), np.zeros(len(rows), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.zarr"
        remembered(path, {}, lambda: pool)
        ours = seconds(lambda: remembered(path, {}, lambda: pool), 2)
    peer = forward_s * len(rows)
    return faster(
        f"{len(rows)} random segments, read; made anew", ours, peer, 10.0, unit="s",
        device=rows.device.type,
    )  # fmt: skip


def separators(job: Callable[[Tensor], Callable[[], object]], maps: Tensor, ours: float,
               seconds: Seconds) -> Row:  # fmt: skip
    """Compare separators of maps in the network's own type with those in float32."""
    peer = seconds(job(maps.float()), 1)
    what = f"separators in {str(maps.dtype).removeprefix('torch.')}, float32"
    return faster(what, ours, peer, 1.3, unit="s", device=maps.device.type)


def means(pooled: Array, image: Array, config: ExtractConfig, seconds: Seconds) -> list[Row]:
    """Compare clusters with scikit-learn's K-means of one start as it comes: time and cost."""
    costs: list[list[float]] = [[], []]

    def ours(seed: int) -> None:
        groups = cluster(pooled, image, config, seed)
        costs[0].append(sum(group.size * group.cost for group in groups))

    def peer(seed: int) -> None:
        found = KMeans(config.clusters, n_init=1, random_state=seed).fit(pooled)
        near = found.cluster_centers_[found.labels_]
        costs[1].append(float(np.linalg.norm(pooled - near, axis=1).sum()))

    spent = [
        seconds(lambda job=job: [job(seed) for seed in range(4)], 1) / 4 for job in (ours, peer)
    ]
    cost = [float(np.mean(values)) / len(pooled) for values in costs]
    return [
        faster("K-means, scikit-learn's of one start", spent[0], spent[1], 1.3, unit="s"),
        faster("mean distance to the centre, scikit-learn's", cost[0], cost[1], 0.99, unit=""),
    ]
