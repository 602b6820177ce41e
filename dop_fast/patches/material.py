"""What a network is scored on: equally many of each class, in chunks that mix the classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from dop_fast.config import DataConfig, PruneConfig
from dop_fast.errors import StoreError
from dop_fast.images import ImageSet, normalise
from dop_fast.patches import baselines, dop
from dop_fast.seeding import stream
from dop_fast.stores import PatchStore
from dop_fast.types import Array, Batch, ClassConcepts

Read: TypeAlias = Callable[[Array], Array]
"""From items int[k] to pixels uint8[k h w 3]; item i is of class i // per_class."""


@dataclass(frozen=True)
class Material:
    """Batches made anew, one at a time, whenever they are iterated; always the same."""

    chunks: tuple[Array, ...]
    make: Callable[[Array], Batch]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.make, self.chunks)


def gather(
    kind: str,
    store: PatchStore | None,
    images: ImageSet,
    data: DataConfig,
    config: PruneConfig,
    *,
    seed: int,
    device: torch.device,
) -> Material:
    """Return `config.per_class` items of each class, as normalised batches on `device`.

    `kind`: stitched, patches, random-segments (these need the store), images or ones. The order
    is shuffled by the seed. Chunks are of `config.batch_size`, or even and a little smaller, and
    never of a single item (unless that is all), of which batch norm has no variance. Raises
    StoreError and DataError where a class has too few.
    """
    read = None if kind == "ones" else _reader(kind, store, images, config.per_class, seed)

    def make(items: Array) -> Batch:
        labels = torch.from_numpy(items // config.per_class).to(device)
        if read is None:
            return baselines.all_ones(len(items), images.size, device), labels
        pixels = torch.from_numpy(read(items)).to(device)
        return normalise(pixels, data.mean, data.std), labels

    count = config.per_class * len(images.classes)
    order = stream(seed, "material").permutation(count)
    chunks = max(1, min(-(-count // config.batch_size), count // 2))
    return Material(tuple(np.array_split(order, chunks)), make)


def _reader(
    kind: str, store: PatchStore | None, images: ImageSet, per_class: int, seed: int
) -> Read:
    if kind == "images":
        drawn = [
            baselines.random_images(images, class_id, per_class, seed)
            for class_id in range(len(images.classes))
        ]
        index = np.concatenate(drawn)
        return lambda items: images.load(index[items])
    if store is None:
        raise StoreError(f"{kind} come from a store of patches", "run: dopfast extract")
    if kind == "stitched":
        return _stitched(store, per_class)
    choose = dop.choose if kind == "patches" else baselines.random_segments
    return _segments(store, images, choose, per_class, seed)


def _segments(
    store: PatchStore,
    images: ImageSet,
    choose: Callable[[ClassConcepts, int, int], Array],
    per_class: int,
    seed: int,
) -> Read:
    chosen = []
    for class_id in range(len(images.classes)):
        found = store.concepts(class_id)
        chosen.append(found.segments.select(choose(found, per_class, seed)))
    segments = dop.join(chosen)  # bit masks: all of them take less memory than one batch of pixels

    def read(items: Array) -> Array:
        drawn = segments.select(items)
        return dop.render(drawn, images.load, store.header.fill, items // per_class).pixels

    return read


def _stitched(store: PatchStore, per_class: int) -> Read:
    stored = store.stitching["per_class"] if store.stitching else 0
    if stored < per_class:
        raise StoreError(
            f"{store.path} has {stored} stitched patches of each class, {per_class} are asked for",
            f"make more: dopfast stitch --per-class {per_class} --force",
        )

    def read(items: Array) -> Array:
        class_id, which = np.divmod(items, per_class)
        return store.stitched(class_id * stored + which).pixels

    return read
