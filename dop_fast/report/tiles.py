"""Small pictures of segments: in place on grey, and outlined in the photograph they come from."""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from dop_fast.images import ImageSet
from dop_fast.patches import dop
from dop_fast.types import Array, ClassConcepts, Concept

GAP = 4
LINE = (255, 255, 255)
DIM = 0.55
"""Brightness of a photograph outside the region that is meant."""


@dataclass(frozen=True)
class Film:
    """How a concept's segments are laid out: `count` columns of `side` pixels."""

    count: int
    side: int


def outlined(pixels: Array, mask: Array, side: int) -> Image.Image:
    """Return the whole picture, darker outside the region, with the region's outline."""
    large = np.asarray(fit(pixels, side))
    region = cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    made = np.where(region[..., None] > 0, large, (large * DIM).astype(np.uint8))
    contours, _ = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(side / 80))
    cv2.drawContours(made, contours, -1, LINE, width, cv2.LINE_AA)
    return Image.fromarray(made)


def fit(pixels: Array, side: int) -> Image.Image:
    """Return uint8[h w 3] as a side x side picture; small images show their pixels."""
    small = side >= 2 * pixels.shape[0]
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return Image.fromarray(pixels).resize((side, side), how)


def grid(rows: list[list[Image.Image]], columns: int = 1) -> Image.Image:
    """Return equal square tiles as one picture with transparent gaps, at least `columns` wide."""
    step = rows[0][0].width + GAP
    width = max(columns, *map(len, rows)) * step - GAP
    sheet = Image.new("RGBA", (width, len(rows) * step - GAP), (0, 0, 0, 0))
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (x * step, y * step))
    return sheet


def film(
    found: ClassConcepts, concept: Concept, sources: ImageSet, fill: int, layout: Film
) -> Image.Image:
    """Return a concept as in the paper's Figure 2: segments above, their photographs below.

    Photographs are decoded no larger than a tile, which is most of what a page takes.
    """
    small = replace(sources, size=min(layout.side, sources.size))
    segments, photographs = dop.with_sources(
        found.segments.select(concept.members[: layout.count]), small.load
    )
    above, below = [], []
    for i, image in enumerate(segments.image):
        region = np.zeros(segments.canvas, np.float32)
        top, left, bottom, right = segments.box[i]
        region[top:bottom, left:right] = segments.mask(i)
        above.append(fit(_on_fill(photographs[image], region, fill), layout.side))
        below.append(outlined(photographs[image], region, layout.side))
    return grid([above, below], layout.count)  # few are no larger than many


def _on_fill(pixels: Array, region: Array, fill: int) -> Array:
    """Return the region alone, of whatever size it is, in place on the fill."""
    share = cv2.resize(region, pixels.shape[:2], interpolation=cv2.INTER_AREA)[..., None]
    return np.asarray(np.round(fill + share * (pixels - np.float32(fill))), np.uint8)
