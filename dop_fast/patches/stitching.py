"""Super Stitching: segments of all concepts of a class on one image (section 3.3, Algorithm 2)."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from dop_fast.config import StitchConfig
from dop_fast.errors import StoreError
from dop_fast.images import ImageSet
from dop_fast.kernels import paste
from dop_fast.patches.dop import with_sources
from dop_fast.seeding import stream
from dop_fast.stores import Load, PatchStore
from dop_fast.types import Array, ClassConcepts, Patches, Track, untracked


def stitch_all(
    store: PatchStore, images: ImageSet, config: StitchConfig, seed: int, track: Track = untracked
) -> Iterator[Patches]:
    """Yield the stitched patches of one class after the other; `images` as extracted from.

    As many classes as torch may use threads are read and stitched at the same time.
    Images are decoded only where the store lacks their pixels.
    """

    def made(class_id: int) -> Patches:
        found = store.concepts(class_id)
        load = store.sources(found) or images.load
        return stitch_class(found, load, config, store.header.fill, seed)

    threads, names = torch.get_num_threads(), store.header.classes
    pool = ThreadPoolExecutor(threads)
    try:
        classes, waiting = range(len(names)), deque[Future[Patches]]()
        for class_id in track(classes, lambda i: f"stitching {names[i]}", len(names)):
            ahead = class_id + threads + 1  # one more than work, for the reader takes its time
            for other in classes[class_id + len(waiting) : ahead]:
                waiting.append(pool.submit(made, other))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stitch_class(
    found: ClassConcepts, load: Load, config: StitchConfig, fill: int, seed: int
) -> Patches:
    """Stitch `config.per_class` patches of a class, Algorithm 2.

    A round pastes one segment of every concept, the most important one last, at its own place.
    Rounds follow until their union covers `config.sigma` of the patch, and overshoot: Algorithm 2
    looks only after a round. Where all segments of the class together cover less, the patch ends
    once it shows all they cover, with `reached` false; the literal loop would never end.

    Each concept's waiting list lives on from patch to patch, so none is used twice before all
    are used, and refills in a new random order when it is empty. `config.order`: "round" pastes
    as popped, so a later round hides an earlier one; "importance" pastes the same segments,
    those of the least important concept first.

    Depends on the seed, the class and its concepts alone, and fewer patches are the first of
    more. Only images that something is seen of are loaded. StoreError where the class has no
    concept.
    """
    lists = [concept.members for concept in reversed(found.concepts) if len(concept.members)]
    if not lists:
        raise StoreError(
            f"class {found.class_id} has no concept to stitch",
            "look for smaller ones: dopfast extract --min-members 5 --force",
        )
    segments = found.segments.select(np.concatenate(lists))
    queue = _queue([len(members) for members in lists], config.per_class, found.class_id, seed)
    ends = paste.cover(segments, queue, config.sigma, config.per_class)
    rounds = [queue[start:end] for start, end in pairwise([0, *ends])]
    if config.order == "importance":
        rounds = [popped.T for popped in rounds]
    placements = np.concatenate([popped.ravel() for popped in rounds])
    starts = np.array([0, *ends]) * len(lists)
    seen = paste.visible(segments, placements, starts)
    kept = np.flatnonzero(seen)
    used, shown = np.unique(placements[kept], return_inverse=True)
    drawn, sources = with_sources(segments.select(used), load)
    pixels, valid = paste.paint(drawn, sources, shown, np.searchsorted(kept, starts), fill)
    rank = np.repeat(np.arange(len(lists))[::-1], [len(members) for members in lists])
    shares = _sums(seen, rank[placements], starts) / valid[0].size
    labels = np.full(len(pixels), found.class_id, np.int64)
    patches = Patches(
        pixels, valid, labels, np.ones(len(pixels), np.bool_), shares.astype(np.float32)
    )
    patches.reached[:] = patches.coverage >= config.sigma
    return patches


def _sums(values: Array, rank: Array, starts: Array) -> NDArray[np.float64]:
    """Add values from each start to the next up, by rank; float64[starts - 1, ranks]."""
    patch = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    shape = (len(starts) - 1, rank.max() + 1)
    sums = np.bincount(patch * shape[1] + rank, values, minlength=shape[0] * shape[1])
    return np.asarray(sums.reshape(shape), np.float64)


def _queue(sizes: list[int], patches: int, class_id: int, seed: int) -> Array:
    """Return what each round pops, int64[rounds concepts], enough rounds for all patches.

    Concepts stand in ascending importance, their segments one concept after the other.
    """
    # any 2 q - 1 pops in a row hold one whole filling of a list of q, thus all a patch can use
    rounds = patches * (2 * max(sizes) - 1)
    columns = []
    for rank, size in enumerate(sizes):
        rng = stream(seed, "stitch", class_id, rank)
        fillings = np.tile(np.arange(size), (-(-rounds // size), 1))
        columns.append(rng.permuted(fillings, axis=1).ravel()[:rounds] + sum(sizes[:rank]))
    return np.stack(columns, axis=1)
