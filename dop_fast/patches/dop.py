"""Discriminative image patches (section 3.2): one segment of a concept, in place, on the fill."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dop_fast.errors import DataError
from dop_fast.kernels import paste
from dop_fast.seeding import stream
from dop_fast.stores import Load
from dop_fast.types import Array, ClassConcepts, Patches, Segments


def choose(found: ClassConcepts, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` segments of a class, spread evenly over its concepts; int64[count].

    Without replacement. Where they do not divide, the more important concepts give one more;
    where a concept has too few, the others give for it. Fewer are the first of more. DataError
    where the concepts have less than `count` together.
    """
    rng = stream(seed, "patches", found.class_id)
    drawn = [rng.permutation(concept.members) for concept in found.concepts]
    turns = [np.arange(len(members)) for members in drawn]
    members, turn = np.concatenate([[], *drawn]), np.concatenate([[], *turns])
    refuse_if_fewer(len(members), count, f"segments in concepts of class {found.class_id}")
    return members[np.argsort(turn, kind="stable")][:count].astype(np.int64)


def choose_least(found: ClassConcepts, count: int, seed: int) -> NDArray[np.int64]:
    """Draw `count` segments of a class from the least important concept, then from the next.

    int64[count], without replacement; a control: `choose` takes equally many of every concept.
    DataError as there.
    """
    rng = stream(seed, "patches", found.class_id)
    drawn = [rng.permutation(concept.members) for concept in found.concepts]
    members = np.concatenate([[], *drawn[::-1]]).astype(np.int64)
    refuse_if_fewer(len(members), count, f"segments in concepts of class {found.class_id}")
    return members[:count]


def render(segments: Segments, load: Load, fill: int, label: Array) -> Patches:
    """Return every segment alone, at its own place, on the fill value."""
    segments, sources = with_sources(segments, load)
    each = np.arange(len(segments) + 1)
    pixels, valid = paste.paint(segments, sources, each[:-1], each, fill)
    return Patches(pixels, valid, label, np.ones(len(segments), np.bool_))


def with_sources(segments: Segments, load: Load) -> tuple[Segments, Array]:
    """Load each image of the segments once; return them with `image` indexing those pixels."""
    images, image = np.unique(segments.image, return_inverse=True)
    return replace(segments, image=image), load(images)


def join(parts: Sequence[Segments]) -> Segments:
    """Return all segments of the parts, of which there is at least one, in their order."""
    sizes = np.cumsum([0, *(part.offset[-1] for part in parts)])
    shifted = [part.offset[:-1] + size for part, size in zip(parts, sizes, strict=False)]
    return Segments(
        image=np.concatenate([part.image for part in parts]),
        box=np.concatenate([part.box for part in parts]),
        resolution=np.concatenate([part.resolution for part in parts]),
        offset=np.concatenate([*shifted, sizes[-1:]]),
        bits=np.concatenate([part.bits for part in parts]),
        canvas=parts[0].canvas,
    )


def refuse_if_fewer(have: int, count: int, what: str) -> None:
    """Raise DataError where there are fewer than asked for."""
    if have < count:
        raise DataError(
            f"there are {have} {what}, {count} are asked for",
            f"ask for fewer: dopfast prune --per-class {have}"
            if have
            else "extract again: dopfast extract --min-members 5 --force",
        )
