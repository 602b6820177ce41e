"""The report's pictures: every class's concepts (Figure 2) and stitched patches (Figure 3)."""

import base64
import io
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from dop_fast.images import ImageSet
from dop_fast.report import charts, tiles
from dop_fast.report.table import Estimate, estimate
from dop_fast.stores import PatchStore
from dop_fast.types import Array, ClassConcepts, Track, untracked

QUALITY, EFFORT = 72, 2
"""Of WebP, 0 to 100 and 0 to 6: more effort saves 6 % of the bytes for twice the time."""


READ = 32
"""Classes whose stitched patches are read at once: one by one takes several times as long."""


@dataclass(frozen=True)
class Detail:
    """How much a page shows of each class."""

    concepts: int
    film: tiles.Film
    patches: int


FULL = Detail(12, tiles.Film(8, 112), 4)
DETAILS = ((12, FULL), (120, Detail(8, tiles.Film(6, 96), 3)))
LEAST = Detail(5, tiles.Film(3, 52), 1)


def detail(classes: int) -> Detail:
    """Return what fits: 12 classes in full, and 1,000 in less than 30 MB."""
    return next((level for most, level in DETAILS if classes <= most), LEAST)


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class ConceptCard:
    """A concept's numbers; `tcav` is over random sets."""

    rank: int
    tcav: Estimate
    strip: Markup
    p_value: float
    significant: bool
    members: int
    cav_accuracy: float
    picture: Picture | None


@dataclass(frozen=True)
class ClassCard:
    """A class with its concepts, the best first; `hidden` more are not shown.

    `compact` ones are so small that they stand in columns.
    """

    name: str
    segments: int
    concepts: tuple[ConceptCard, ...]
    hidden: int
    compact: bool


@dataclass(frozen=True)
class PatchCard:
    """Some stitched patches of a class."""

    name: str
    coverage: tuple[float, ...]
    picture: Picture


@dataclass(frozen=True)
class Stitching:
    """All stitched patches: their coverage float64[n], and a few of each class to look at."""

    sigma: float
    coverage: Array
    reached: int
    histogram: Markup
    cards: Iterable[PatchCard]


def picture(image: Image.Image) -> Picture:
    """Return the image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=EFFORT)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{text}", image.width, image.height)


def classes(
    store: PatchStore, train: ImageSet | None, track: Track = untracked
) -> Iterator[ClassCard]:
    """Return every class's concepts; without its images, their numbers alone."""
    names = store.header.classes
    level = detail(len(names))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for class_id in track(range(len(names)), lambda i: f"drawing {names[i]}", len(names)):
            found = store.concepts(class_id)
            draw = partial(_concept, store, found, train=train, layout=level.film)
            cards = tuple(pool.map(draw, range(min(level.concepts, len(found.concepts)))))
            hidden = len(found.concepts) - len(cards)
            yield ClassCard(names[class_id], len(found.segments), cards, hidden, level == LEAST)


def _concept(
    store: PatchStore, found: ClassConcepts, rank: int, train: ImageSet | None, layout: tiles.Film
) -> ConceptCard:
    concept = found.concepts[rank]
    tcav = estimate(concept.tcav_runs)
    film = train and tiles.film(found, concept, train, store.header.fill, layout)
    return ConceptCard(
        rank=rank + 1,
        tcav=tcav,
        strip=charts.strip(tcav.values, tcav.interval, charts.Span(0, 1, tick=0.5)),
        p_value=concept.p_value,
        significant=concept.significant(store.header.config["alpha"]),
        members=len(concept.members),
        cav_accuracy=concept.cav_accuracy,
        picture=picture(film) if film else None,
    )


def stitching(store: PatchStore, track: Track = untracked) -> Stitching | None:
    """Return the stitched patches' coverage and a few of each class; None where there are none."""
    about = store.stitching
    if about is None:
        return None
    coverage = store.coverage()
    cards = _patches(store, coverage.reshape(-1, about["per_class"]))
    label = f"\N{GREEK SMALL LETTER SIGMA} = {about['sigma']:g}"
    return Stitching(
        about["sigma"],
        coverage,
        int((coverage >= about["sigma"]).sum()),
        charts.histogram(coverage, about["sigma"], label),
        track(cards, "drawing stitched patches", len(store.header.classes)),
    )


def _patches(store: PatchStore, coverage: Array) -> Iterator[PatchCard]:
    """Return a few of each class, whose patches' coverage is float64[classes per_class]."""
    level = detail(len(store.header.classes))
    shown = np.arange(min(level.patches, coverage.shape[1]))
    for start in range(0, len(coverage), READ):
        of_each = coverage[start : start + READ, : len(shown)]
        rows = (start + np.arange(len(of_each)))[:, None] * coverage.shape[1] + shown
        pixels = store.stitched(rows.ravel()).pixels
        for i, shares in enumerate(of_each.tolist()):
            own = pixels[i * len(shown) : (i + 1) * len(shown)]
            row = [tiles.fit(patch, level.film.side) for patch in own]
            name = store.header.classes[start + i]
            yield PatchCard(name, tuple(shares), picture(tiles.grid([row])))


def p_text(value: float) -> str:
    """Write a p-value."""
    if math.isnan(value):
        return "p not known"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
