"""Contact sheets for looking at a store without a browser: plain RGB images."""

import contextlib
import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dop_fast.concepts.segments import label_maps
from dop_fast.config import ExtractConfig
from dop_fast.errors import ConfigError, StoreError, nearest
from dop_fast.images import ImageSet, open_images
from dop_fast.report import gallery, tiles
from dop_fast.report.table import estimate
from dop_fast.stores import PatchStore
from dop_fast.types import Array, Patches
from dop_fast.workspace import Workspace

PAPER, INK, MUTED, EDGE = (255, 255, 255), (29, 28, 26), (110, 106, 98), (255, 214, 10)
MARGIN, LABEL, TITLE, CAPTION = 20, 160, 54, 24
"""Pixels around a sheet, for the text left of a row, above a sheet and above a picture."""
TITLE_SIZE, TEXT_SIZE, LINE = 20, 14, 19
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf")
"""Looked for on the machine where Pillow's own lacks the letters."""
FILM = tiles.Film(count=8, side=112)


def show(workspace: Workspace, what: str, class_name: str, number: int) -> Image.Image:
    """Return the sheet `what` of one class: concepts, stitched patches, or an image's segments.

    Without a class it is the first one; `number` counts the training images of the class.
    Raises ConfigError where there is no such class or image.
    """
    train, _ = open_images(workspace.data, workspace.root, workspace.seed)
    class_id = _class_id(train.classes, class_name)
    if what == "segments":
        of_class = train.of_class(class_id)
        if not 0 <= number < len(of_class):
            raise ConfigError(
                f"class {train.classes[class_id]} has no image {number}",
                f"its images are 0 to {len(of_class) - 1}",
            )
        image = train.load(of_class[number : number + 1])
        config = ExtractConfig.from_dict(workspace.stages["extract"], "extract")
        title = f"{train.classes[class_id]}: image {number}"
        return segments(image[0], label_maps(image, config)[0], title)
    store = PatchStore(workspace.patches)
    if store.header.data != train.fingerprint:
        raise StoreError(f"{store.path} is of other images", "run: dopfast extract --force")
    if what == "concepts":
        return concepts(store, class_id, train)
    about = store.stitching or {"per_class": 0, "order": ""}
    rows = class_id * about["per_class"] + np.arange(about["per_class"])
    return stitched(store.stitched(rows), train.classes, about["order"])


def _class_id(classes: Sequence[str], name: str) -> int:
    if not name:
        return 0
    if name not in classes:
        raise ConfigError(f"there is no class {name!r}", nearest(name, classes))
    return classes.index(name)


def concepts(store: PatchStore, class_id: int, sources: ImageSet) -> Image.Image:
    """Return a class's concepts, best first: a row each, segments in place above their images.

    `sources` are the images that the store was extracted from.
    """
    found, header = store.concepts(class_id), store.header
    rows = []
    for rank, concept in enumerate(found.concepts, start=1):
        tcav = estimate(concept.tcav_runs)
        significant = concept.significant(header.config["alpha"])
        text = [
            f"{rank}   TCAV {tcav.mean:.2f} ± {tcav.half:.2f}",
            gallery.p_text(concept.p_value),
            f"{len(concept.members)} segments",
            *([] if significant else ["not significant"]),
        ]
        rows.append((text, tiles.film(found, concept, sources, header.fill, FILM)))
    return _sheet(f"{header.classes[class_id]}: {len(found.segments):,} segments", rows)


def stitched(patches: Patches, classes: Sequence[str], order: str = "") -> Image.Image:
    """Return stitched patches, in rows for each class that has any, with their coverage r.

    And with the share of the pixels that each concept is seen in, the most important one first.
    """
    rows = []
    for label in np.unique(patches.label):
        of_class = np.flatnonzero(patches.label == label)
        coverage = patches.coverage[of_class]
        text = [
            classes[label],
            f"coverage {coverage.min():.2f} to {coverage.max():.2f}",
            f"{int(patches.reached[of_class].sum())} of {len(of_class)} reach sigma",
            *(seen(patches.visible[of_class]) if patches.visible is not None else []),
        ]
        row = [tiles.fit(patches.pixels[i], FILM.side) for i in of_class]
        lines = [row[i : i + FILM.count] for i in range(0, len(row), FILM.count)]
        rows.append((text, tiles.grid(lines)))
    return _sheet("stitched patches" + (f", order: {order}" if order else ""), rows)


def seen(visible: Array) -> list[str]:
    """Return the mean share of each concept, float32[n k], in lines that fit beside a row."""
    shares = np.nan_to_num(visible).mean(axis=0)
    numbers = ", ".join(f"{100 * x:.0f}" for x in shares)
    return ["of each concept:", *textwrap.wrap(f"{numbers} %", 22)]


def segments(image: Array, labels: Array, title: str = "", side: int = 320) -> Image.Image:
    """Return uint8[h w 3] once for each resolution of labels int[r h w], with the boundaries."""
    height = TITLE + CAPTION + side + MARGIN
    sheet = _blank(2 * MARGIN + len(labels) * (side + 2 * tiles.GAP) - 2 * tiles.GAP, height)
    _write(sheet, (MARGIN, 14), title, INK, sheet.width - 2 * MARGIN)
    for i, resolution in enumerate(labels):
        left = MARGIN + i * (side + 2 * tiles.GAP)
        sheet.paste(_bounded(image, resolution, side), (left, TITLE + CAPTION))
        _write(sheet, (left, TITLE), f"{len(np.unique(resolution))} segments", MUTED, side)
    return sheet


def _bounded(image: Array, labels: Array, side: int) -> Image.Image:
    """Draw the boundaries after enlarging, so that they stay thin, and dark beside them."""
    pixels = np.array(tiles.fit(image, side))
    rows, columns = (np.arange(side) * length // side for length in labels.shape)
    large = labels[np.ix_(rows, columns)]
    edge = np.zeros(large.shape, np.uint8)
    edge[:-1] |= large[:-1] != large[1:]
    edge[:, :-1] |= large[:, :-1] != large[:, 1:]
    pixels[cv2.dilate(edge, np.ones((3, 3), np.uint8)) > 0] = INK
    pixels[edge > 0] = EDGE
    return Image.fromarray(pixels)


def _sheet(title: str, rows: Sequence[tuple[list[str], Image.Image]]) -> Image.Image:
    """Stack rows of text and picture under a title."""
    height = TITLE + sum(picture.height + MARGIN for _, picture in rows)
    width = 2 * MARGIN + LABEL + max((picture.width for _, picture in rows), default=0)
    sheet = _blank(width, height)
    _write(sheet, (MARGIN, 14), title, INK, sheet.width - 2 * MARGIN)
    top = TITLE
    for text, picture in rows:
        for i, line in enumerate(text):
            _write(sheet, (MARGIN, top + LINE * i), line, MUTED if i else INK, LABEL - MARGIN)
        sheet.paste(picture, (MARGIN + LABEL, top), picture)
        top += picture.height + MARGIN
    return sheet


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def _write(
    sheet: Image.Image, at: tuple[int, int], text: str, colour: tuple[int, int, int], room: int
) -> None:
    """Write a line, its end left out where it is longer than `room`."""
    font = _font(TITLE_SIZE if at[1] < TITLE else TEXT_SIZE, text)
    while font.getlength(text) > room:
        text = text[:-4] + "..."
    ImageDraw.Draw(sheet).text(at, text, colour, font)


def _font(size: int, text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return the first font that has every letter, Pillow's own where none has."""
    for name in (None, *FONTS):
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
            absent = bytes(font.getmask("\uffff"))
            if all(bytes(font.getmask(letter)) != absent for letter in set(text)):
                return font
    return ImageFont.load_default(size)
