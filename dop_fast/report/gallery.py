"""The report's pictures: every class's concepts (Figure 2) and stitched patches (Figure 3)."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from dop_fast.images import ImageSet
from dop_fast.report import charts, tiles
from dop_fast.report.table import Estimate, estimate
from dop_fast.stores import PatchStore
from dop_fast.types import Array, ClassConcepts

QUALITY = 72
"""Of WebP, 0 to 100."""


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
    cards: tuple[PatchCard, ...]


def picture(image: Image.Image) -> Picture:
    """Return the image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{text}", image.width, image.height)


def classes(store: PatchStore, train: ImageSet | None) -> Iterator[ClassCard]:
    """Return every class's concepts; without its images, their numbers alone."""
    level = detail(len(store.header.classes))
    for class_id, name in enumerate(store.header.classes):
        found = store.concepts(class_id)
        shown = found.concepts[: level.concepts]
        cards = tuple(_concept(store, found, rank, train, level.film) for rank in range(len(shown)))
        yield ClassCard(
            name, len(found.segments), cards, len(found.concepts) - len(shown), level == LEAST
        )


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


def stitching(store: PatchStore) -> Stitching | None:
    """Return the stitched patches' coverage and a few of each class; None where there are none."""
    about = store.stitching
    if about is None:
        return None
    level = detail(len(store.header.classes))
    coverage = store.coverage().reshape(-1, about["per_class"])  # class by class
    cards = []
    for class_id, name in enumerate(store.header.classes):  # all at once may not fit in memory
        shown = min(level.patches, about["per_class"])
        patches = store.stitched(class_id * about["per_class"] + np.arange(shown))
        row = [tiles.fit(pixels, level.film.side) for pixels in patches.pixels]
        cards.append(
            PatchCard(name, tuple(coverage[class_id, :shown].tolist()), picture(tiles.grid([row])))
        )
    return Stitching(
        about["sigma"],
        coverage.ravel(),
        int((coverage >= about["sigma"]).sum()),
        charts.histogram(
            coverage.ravel(), about["sigma"], f"\N{GREEK SMALL LETTER SIGMA} = {about['sigma']:g}"
        ),
        tuple(cards),
    )


def p_text(value: float) -> str:
    """Write a p-value."""
    if math.isnan(value):
        return "p not known"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
