"""What a network is scored on: exact counts, in chunks that mix the classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dop_fast.config import DataConfig, ExtractConfig, PruneConfig, StitchConfig
from dop_fast.errors import ConfigError, DataError, StoreError, nearest
from dop_fast.images import ImageSet, normalise
from dop_fast.patches import baselines, dop, stitching
from dop_fast.patches.cropping import crop
from dop_fast.seeding import stream
from dop_fast.stores import PatchStore
from dop_fast.types import Array, Batch, ClassConcepts, Segments

Read: TypeAlias = Callable[[Array], tuple[Array, Array | None]]
"""From items int[k] to pixels uint8[k h w 3] and which are of a patch, bool[k h w]; None: all."""
Draw: TypeAlias = Callable[[ClassConcepts, int, int], Array]
"""From a class, a count and a seed to the segments drawn, int64[count]."""
Few: TypeAlias = list[tuple[int, int]]
"""Classes, and how many of something they have."""

REPEATED = "shown repeatedly"
NAMED = 5  # classes that a note names before it counts the rest


@dataclass(frozen=True)
class Material:
    """Batches made anew, one at a time, whenever they are iterated; always the same.

    `notes`: which classes had too little, and what was done.
    """

    chunks: tuple[Array, ...]
    make: Callable[[Array], Batch]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        return map(self.make, self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, at: int) -> Batch:
        return self.make(self.chunks[at])

    @property
    def repeated(self) -> str:
        """The note that says which items come several times, if any do."""
        return next((note for note in self.notes if REPEATED in note), "")


@dataclass(frozen=True)
class Ask:
    """What is asked for, and of what."""

    store: PatchStore | None
    images: ImageSet
    per_class: int
    seed: int

    @property
    def classes(self) -> range:
        """All classes."""
        return range(len(self.images.classes))

    @property
    def patches(self) -> PatchStore:
        """The store; StoreError where there is none."""
        if self.store is None:
            raise StoreError("patches come from a store of them", "run: dopfast extract")
        return self.store

    @property
    def fill(self) -> int:
        """Grey value around a patch."""
        return self.store.header.fill if self.store else ExtractConfig().fill


@dataclass(frozen=True)
class Items:
    """Labels int64[n] of all items, and what reads some of them.

    `read` gives pixels; where it is None, `inputs` gives what enters the network.
    """

    labels: Array
    read: Read | None
    inputs: Callable[[Array, torch.device], Tensor] | None = None
    notes: tuple[str, ...] = ()


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

    `kind` is one of `KINDS`; those of `WITHOUT_STORE` need no store. images-random draws as many
    in all, of whatever class; less-patch is one patch of each class. A class with fewer than
    asked gives its items several times, and `notes` says so. The order is shuffled by the seed.
    Chunks are of `config.batch_size`, or even and a little smaller, and never of a single item
    (unless that is all), of which batch norm has no variance. Raises StoreError and DataError
    where a class has nothing, ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no material {kind!r}", nearest(kind, KINDS))
    ask = Ask(store, images, config.per_class, seed)
    plain = kind.removesuffix(PERMUTED)
    found = _SOURCES[plain](ask)
    labels = found.labels
    if plain != kind:
        labels = stream(seed, "permuted-labels").permutation(labels)

    def make(items: Array) -> Batch:
        answers = torch.from_numpy(labels[items]).to(device)
        if found.read is None:
            assert found.inputs is not None  # one of the two is given
            return found.inputs(items, device), answers
        pixels, valid = found.read(items)
        cropped = torch.from_numpy(crop(pixels, valid, items, config.augment, seed)).to(device)
        return normalise(cropped, data.mean, data.std), answers

    order = stream(seed, "material").permutation(len(labels))
    chunks = max(1, min(-(-len(labels) // config.batch_size), len(labels) // 2))
    return Material(tuple(np.array_split(order, chunks)), make, found.notes)


# --- images
def _images(ask: Ask) -> Items:
    drawn: list[Array] = []
    few: Few = []
    for class_id in ask.classes:
        have = len(ask.images.of_class(class_id))
        index = baselines.random_images(ask.images, class_id, min(have, ask.per_class), ask.seed)
        drawn.append(_exactly(ask, class_id, index, few))
    return _of_images(ask, np.concatenate(drawn), _fewer(ask, few, "images"))


def _any_images(ask: Ask) -> Items:
    count = ask.per_class * len(ask.classes)
    return _of_images(ask, baselines.any_images(ask.images, count, ask.seed))


def _of_images(ask: Ask, index: Array, notes: tuple[str, ...] = ()) -> Items:
    return Items(
        ask.images.labels[index], lambda items: (ask.images.load(index[items]), None), None, notes
    )


# --- patches
def _patches(ask: Ask, draw: Draw = dop.choose, *, blur: bool = False) -> Items:
    chosen: list[Segments] = []
    few: Few = []
    poor: Few = []
    store, pool = ask.patches, "segments" if draw is baselines.random_segments else "patches"
    for class_id in ask.classes:
        found = store.concepts(class_id)
        concepts = found.concepts
        have = len(np.concatenate([[], *(concept.members for concept in concepts)]))
        if pool == "segments":
            have = len(found.segments)
        elif len(concepts) < store.header.config.get("top", 0):
            poor.append((class_id, len(concepts)))
        index = _exactly(ask, class_id, draw(found, min(have, ask.per_class), ask.seed), few)
        chosen.append(found.segments.select(index))
    segments = dop.join(chosen)  # bit masks: all of them take less memory than one batch of pixels

    def read(items: Array) -> tuple[Array, Array]:
        drawn, labels = segments.select(items), items // ask.per_class
        made = dop.render(drawn, ask.images.load, ask.fill, labels)
        pixels = baselines.blurred(made.pixels, made.valid, ask.fill) if blur else made.pixels
        return pixels, made.valid

    notes = (*_fewer_concepts(ask, poor), *_fewer(ask, few, pool))
    return Items(_balanced(ask), read, None, notes)


def _less_patch(ask: Ask) -> Items:
    return _patches(replace(ask, per_class=1))


def _stitched(ask: Ask, *, blur: bool = False) -> Items:
    store = ask.patches
    stored = store.stitching["per_class"] if store.stitching else 0
    if stored < ask.per_class:
        raise StoreError(
            f"{store.path} has {stored} stitched patches of each class, "
            f"{ask.per_class} are asked for",
            f"make more: dopfast stitch --per-class {ask.per_class} --force",
        )

    def read(items: Array) -> tuple[Array, Array]:
        class_id, which = np.divmod(items, ask.per_class)
        made = store.stitched(class_id * stored + which)
        pixels = baselines.blurred(made.pixels, made.valid, ask.fill) if blur else made.pixels
        return pixels, made.valid

    return Items(_balanced(ask), read)


def _stitched_in_reverse(ask: Ask) -> Items:
    """Stitch as the store's patches were, but with the most important concept at the bottom.

    Made at the first batch and held in memory.
    """
    store, known = ask.patches, {item.name for item in fields(StitchConfig)}
    about = {key: value for key, value in (store.stitching or {}).items() if key in known}
    config = StitchConfig(**{**about, "per_class": ask.per_class})
    seed = (store.stitching or {}).get("seed", ask.seed)

    @cache
    def made() -> tuple[Array, Array]:
        parts = []
        for class_id in ask.classes:
            found = store.concepts(class_id)
            load = store.sources(found) or ask.images.load
            found = replace(found, concepts=found.concepts[::-1])
            parts.append(stitching.stitch_class(found, load, config, ask.fill, seed))
        return (
            np.concatenate([part.pixels for part in parts]),
            np.concatenate([part.valid for part in parts]),
        )

    def read(items: Array) -> tuple[Array, Array]:
        pixels, valid = made()
        return pixels[items], valid[items]

    return Items(_balanced(ask), read)


# --- no image at all
def _ones(ask: Ask) -> Items:
    def ones(items: Array, device: torch.device) -> Tensor:
        return baselines.all_ones(len(items), ask.images.size, device)

    return Items(_balanced(ask), None, ones)


def _noise(ask: Ask) -> Items:
    def noise(items: Array, device: torch.device) -> Tensor:
        return baselines.noise(items, ask.images.size, ask.seed, device)

    return Items(_balanced(ask), None, noise)


def _grey(ask: Ask) -> Items:
    shape = (ask.images.size, ask.images.size, 3)
    return Items(
        _balanced(ask), lambda items: (np.full((len(items), *shape), ask.fill, np.uint8), None)
    )


# --- counts
def _balanced(ask: Ask) -> Array:
    return np.repeat(np.arange(len(ask.classes)), ask.per_class)


def _exactly(ask: Ask, class_id: int, drawn: Array, few: Few) -> Array:
    """Return as many as asked for: all that were drawn again and again where they are fewer."""
    if not len(drawn):
        raise DataError(
            f"class {ask.images.classes[class_id]} has nothing to draw from",
            "look for smaller concepts: dopfast extract --min-members 5 --force",
        )
    if len(drawn) < ask.per_class:
        few.append((class_id, len(drawn)))
    return np.resize(drawn, ask.per_class)


def _fewer(ask: Ask, few: Few, what: str) -> tuple[str, ...]:
    if not few:
        return ()
    return (f"fewer {what} than {ask.per_class}, so {REPEATED}: {_named(ask, few)}",)


def _fewer_concepts(ask: Ask, found: Few) -> tuple[str, ...]:
    if not found:
        return ()
    top = ask.patches.header.config["top"]
    return (f"fewer concepts than {top}, so more patches of each: {_named(ask, found)}",)


def _named(ask: Ask, found: Few) -> str:
    named = [f"{ask.images.classes[class_id]} ({have})" for class_id, have in found[:NAMED]]
    rest = len(found) - NAMED
    return ", ".join(named) + (f" and {rest} more classes" if rest > 0 else "")


PERMUTED = "-permuted"
_SOURCES: dict[str, Callable[[Ask], Items]] = {
    "stitched": _stitched,
    "patches": _patches,
    "images": _images,
    "images-random": _any_images,
    "random-segments": partial(_patches, draw=baselines.random_segments),
    "less-patch": _less_patch,
    "ones": _ones,
    "grey": _grey,
    "noise": _noise,
    "patches-blurred": partial(_patches, blur=True),
    "stitched-blurred": partial(_stitched, blur=True),
    "patches-reversed": partial(_patches, draw=dop.choose_least),
    "stitched-reversed": _stitched_in_reverse,
}
KINDS = (*_SOURCES, *(f"{kind}{PERMUTED}" for kind in ("stitched", "patches", "images")))
"""All materials; a permuted one has the same images, their labels drawn anew among them."""
WITHOUT_STORE = ("images", "images-random", "ones", "grey", "noise", f"images{PERMUTED}")
"""Those that need no patches."""
