"""The two halves that scores are compared between: no photograph is in both.

Patches of one photograph overlap, and stitching uses every segment again and again: halves that
share photographs would agree because they show the same pixels. So the photographs of each class
are halved, and patches cut and stitched patches made of either half alone. What the concepts are
was found on all of them, which both halves share.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dop_fast.config import StitchConfig
from dop_fast.images import ImageSet
from dop_fast.patches.stitching import stitch_class
from dop_fast.seeding import derive, stream
from dop_fast.stores import Load, PatchStore
from dop_fast.types import Array, ClassConcepts, Patches


@dataclass(frozen=True)
class Half:
    """What `patches.material.gather` takes: some of the photographs, and what was cut from them."""

    images: ImageSet
    store: PatchStore | None


def halve(
    images: ImageSet, store: PatchStore | None, seed: int, stitched: int = 0
) -> tuple[Half, Half]:
    """Halve the photographs of each class at random, those in the store evenly.

    `stitched` patches of each class are made anew of each half, where the store has any.
    """
    labels = np.full((2, len(images)), -1)  # no class: not in this half
    for class_id in range(len(images.classes)):
        own = images.of_class(class_id)
        used = np.unique(store.concepts(class_id).segments.image) if store else own[:0]
        rng = stream(seed, "halves", class_id)
        order = np.concatenate([rng.permutation(used), rng.permutation(np.setdiff1d(own, used))])
        for half in range(2):
            labels[half, order[half::2]] = class_id
    first, second = (
        Half(
            replace(images, labels=labels[half]),
            _Part(store, images, labels[half] >= 0, stitched, derive(seed, "half", half))
            if store
            else None,
        )
        for half in range(2)
    )
    return first, second


def redrawn(images: ImageSet, store: PatchStore, seed: int, stitched: int) -> PatchStore:
    """Return the store with other stitched patches, `stitched` of each class, of all segments."""
    return _Part(store, images, np.ones(len(images), np.bool_), stitched, seed)


class _Part(PatchStore):
    """The part of a store that was cut from some photographs, bool[n] `mine`."""

    def __init__(
        self, whole: PatchStore, images: ImageSet, mine: NDArray[np.bool_], stitched: int, seed: int
    ) -> None:
        self.path, self.header = whole.path, whole.header
        self._whole, self._images, self._mine = whole, images, mine
        self._per_class, self._seed = stitched, seed
        self._found, self._pixels = cache(self._select), cache(self._stitch)

    def concepts(self, class_id: int) -> ClassConcepts:
        """Return one class's segments and concepts' members that are of these photographs."""
        return self._found(class_id)

    def sources(self, found: ClassConcepts) -> Load | None:
        """Return None: the stored pixels are those of the whole class."""
        return None

    @property
    def stitching(self) -> dict[str, Any] | None:
        """Return the settings of the whole store, but for how many there are."""
        about = self._whole.stitching
        return {**about, "per_class": self._per_class} if about else None

    def stitched(self, index: Array | None = None) -> Patches:
        """Return stitched patches of these photographs alone."""
        count = self._per_class * len(self.header.classes)
        index = np.arange(count) if index is None else index
        parts = [(self._pixels(int(i) // self._per_class), int(i) % self._per_class) for i in index]
        return Patches(
            np.stack([part.pixels[i] for part, i in parts]),
            np.stack([part.valid[i] for part, i in parts]),
            index // self._per_class,
            np.array([part.reached[i] for part, i in parts]),
        )

    def _select(self, class_id: int) -> ClassConcepts:
        found = self._whole.concepts(class_id)
        own = self._mine[found.segments.image]
        number = np.cumsum(own) - 1  # of each segment among these
        return ClassConcepts(
            class_id,
            found.segments.select(np.flatnonzero(own)),
            tuple(
                replace(concept, members=number[concept.members[own[concept.members]]])
                for concept in found.concepts
            ),
        )

    def _stitch(self, class_id: int) -> Patches:
        about = self.stitching or {}
        config = StitchConfig(
            **{key: about[key] for key in StitchConfig().to_dict() if key in about}
        )
        return stitch_class(
            self.concepts(class_id), self._images.load, config, self.header.fill, self._seed
        )
