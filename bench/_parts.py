"""What single parts of an extraction gain over the plain way to do them."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from _timing import Row, alternate, faster
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
        with torch.inference_mode(), autocast(probe.device, probe.dtype):
            probe._model(batch)

    ours = seconds(lambda: list(probe.activations(parts)), 3) / len(batch)
    peer = seconds(plain, 3) / len(batch)
    what = f"forward of a segment, autocast in a batch of {len(batch)}"
    return faster(what, 1e3 * ours, 1e3 * peer, 1.15, unit="ms", device=probe.device.type)


def random_sets(rows: Tensor, forward_s: float) -> Row:
    """Compare reading random sets from a file just written with forwards of as many segments.

    By the clock: Zarr reads in threads of its own.
    """
    pool = rows.cpu(), np.zeros(len(rows), np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.zarr"
        remembered(path, {}, lambda: pool)
        job = {"read": lambda: remembered(path, {}, lambda: pool)}
        ours = min(alternate(job, 3, clock=time.perf_counter)["read"])
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


def means(pooled: Array, config: ExtractConfig, seconds: Seconds) -> list[Row]:
    """Compare clusters with scikit-learn's K-means of one start as it comes: time and cost."""
    costs: list[list[float]] = [[], []]
    config = replace(config, min_members=2)
    image = np.arange(len(pooled))  # from as many images: then every cluster is popular

    def ours(seed: int) -> None:
        groups = cluster(pooled, image, config, seed)
        assert sum(group.size for group in groups) >= 0.99 * len(pooled), "clusters are missing"
        costs[0].append(sum(group.size * group.cost for group in groups) / len(pooled))

    def peer(seed: int) -> None:
        found = KMeans(config.clusters, n_init=1, random_state=seed).fit(pooled)
        near = found.cluster_centers_[found.labels_]
        costs[1].append(float(np.linalg.norm(pooled - near, axis=1).mean()))

    spent = [
        seconds(lambda job=job: [job(seed) for seed in range(4)], 1) / 4 for job in (ours, peer)
    ]
    cost = [float(np.mean(values)) for values in costs]
    return [
        faster("K-means, scikit-learn's of one start", spent[0], spent[1], 1.3, unit="s"),
        faster("mean distance to the centre, scikit-learn's", cost[0], cost[1], 0.99, unit=""),
    ]
