"""The demo's images, whose evidence is a known region, and the measure that uses it.

Small textured objects lie at random places, scales and angles on crops of the two photographs
that scikit-learn ships. An outline, a texture and a tendency of hue make a class. Backgrounds and
the plain shapes strewn on them are drawn alike for all classes, so nothing but the object tells
the class, and a concept that explains it must lie on the object.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from dop_fast import seeding
from dop_fast.errors import DataError, StoreError
from dop_fast.types import Array, Segments

if TYPE_CHECKING:
    from dop_fast.images import ImageSet
    from dop_fast.stores import PatchStore

Pixels: TypeAlias = NDArray[np.uint8]
Plane: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.bool_]
Drawing: TypeAlias = Callable[[Plane, Plane], Mask]

TRUTH = "truth.npz"
OVERSAMPLE = 4
OBJECT_SHARE = (0.10, 0.20)
"""Area of an object, as a share of the image."""
PLAIN_SHARE = (0.02, 0.05)
"""Area of each of the plain shapes, which are no evidence."""
HUE_SPREAD = 30.0
"""Standard deviation of an object's hue in degrees, classes being 72 apart: hues overlap."""


def _star(x: Plane, y: Plane) -> Mask:
    tip = np.pi / 5  # one of ten mirrored wedges, from a tip to the notch at half the radius
    angle = abs((np.arctan2(x, y) + tip) % (2 * tip) - tip)
    across, along = np.hypot(x, y) * np.sin(angle), np.hypot(x, y) * np.cos(angle)
    notch_across, notch_along = 0.5 * np.sin(tip), 0.5 * np.cos(tip)
    inside = (1 - along) * notch_across > across * (1 - notch_along)
    return np.asarray(inside, np.bool_)


@dataclass(frozen=True)
class Kind:
    """What a class looks like: mean hue, outline in the unit circle, where its second colour is."""

    hue: float
    outline: Drawing
    texture: Drawing


CLASSES = {
    "checkered_square": Kind(
        0.0,
        lambda x, y: np.maximum(abs(x), abs(y)) < np.sqrt(0.5),
        lambda x, y: (np.sin(9 * x) > 0) ^ (np.sin(9 * y) > 0),
    ),
    "dotted_triangle": Kind(
        72.0,
        lambda x, y: np.maximum(abs(x) * np.sqrt(0.75) - y * 0.5, y) < 0.5,
        lambda x, y: np.hypot((x / 0.42 + 0.5) % 1 - 0.5, (y / 0.42) % 1 - 0.5) < 0.28,
    ),
    "ringed_star": Kind(144.0, _star, lambda x, y: np.cos(15 * np.hypot(x, y)) > 0),
    "striped_disc": Kind(216.0, lambda x, y: np.hypot(x, y) < 1, lambda x, y: np.sin(11 * x) > 0),
    "zigzag_crescent": Kind(
        288.0,
        lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.6, y) > 0.7),
        lambda x, y: np.sin(12 * (y + 0.6 * abs((x / 0.4) % 1 - 0.5))) > 0,
    ),
}


@dataclass(frozen=True)
class Truth:
    """Where the evidence is: `masks` bool[n size size] of the training images `names`."""

    names: tuple[str, ...]
    masks: Mask


@dataclass(frozen=True)
class ClassPrecision:
    """`Precision` of one class; `concepts` is NaN for a class without concepts."""

    name: str
    concepts: float
    random: float


@dataclass(frozen=True)
class Precision:
    """Share of the pixels of segments that lie on the objects, in [0, 1].

    `concepts`: of the members of all the store's concepts. `random`: of all its segments, which
    is what segments taken at random would reach.
    """

    concepts: float
    random: float
    per_class: tuple[ClassPrecision, ...]


def write_images(
    folder: Path, seed: int, *, size: int = 40, train: int = 240, val: int = 60
) -> None:
    """Write `train/<class>/NNNN.png` and `val/<class>/NNNN.png`, and the truth beside them.

    `train` and `val` count the images of each class. StoreError where `folder` is there already.
    """
    if folder.exists():
        raise StoreError(f"{folder} is already there", "remove it, or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names, masks = [], []
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (partial / split / name).mkdir(parents=True)
            for index in range(count):
                path = f"{split}/{name}/{index:04d}.png"
                pixels, mask = draw(name, size, seeding.stream(seed, "demo", split, name, index))
                Image.fromarray(pixels).save(partial / path)
                names.append(path)
                masks.append(mask)
    shown = len(CLASSES) * train
    bits = np.packbits(np.reshape(masks[:shown], (shown, -1)), axis=1)
    np.savez_compressed(partial / TRUTH, names=names[:shown], bits=bits, size=size)
    partial.rename(folder)


def has_truth(folder: Path) -> bool:
    """Return whether `write_images` made the folder."""
    return (folder / TRUTH).is_file()


def load_truth(folder: Path) -> Truth:
    """Read the truth that `write_images` put into `folder`."""
    path = folder / TRUTH
    if not has_truth(folder):
        raise DataError(f"{folder} has no {TRUTH}", "make the demo's images: dopfast demo")
    with np.load(path) as content:
        names, bits, size = content["names"].tolist(), content["bits"], int(content["size"])
    masks = np.unpackbits(bits, axis=1, count=size * size).reshape(-1, size, size)
    return Truth(tuple(names), masks.view(np.bool_))


def draw(name: str, size: int, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """Return an image uint8[size size 3] of a class and the pixels its object touches.

    The background takes its draws from `rng` first, so `background` shows the same image
    without the object.
    """
    kind, pixels = CLASSES[name], background(size, rng)
    hue = rng.normal(kind.hue, HUE_SPREAD) % 360
    return _paste(pixels, _Look(kind.outline, kind.texture, hue, OBJECT_SHARE), rng)


def background(size: int, rng: np.random.Generator) -> Pixels:
    """Return a crop of a photograph with plain shapes strewn on it, uint8[size size 3]."""
    photo = _photographs()[rng.integers(2)]
    side = int(min(photo.shape[:2]) * rng.uniform(1 / 3, 1))
    top, left = (rng.integers(extent - side + 1) for extent in photo.shape[:2])
    crop = cv2.resize(
        photo[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA
    )
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    pixels: Pixels = np.clip(crop * rng.uniform(0.7, 1.2), 0, 255).astype(np.uint8)
    outlines = [kind.outline for kind in CLASSES.values()]
    for _ in range(rng.integers(1, 3, endpoint=True)):
        outline = outlines[rng.integers(len(outlines))]
        pixels, _ = _paste(pixels, _Look(outline, None, rng.uniform(0, 360), PLAIN_SHARE), rng)
    return pixels


def precision(store: "PatchStore", images: "ImageSet", truth: Truth) -> Precision:
    """Hold the store's concepts against the truth; `images` are those the store was made from.

    Images are found in the truth by class folder and file name. DataError where one is missing
    there, or where the truth is of another size than the store's segments.
    """
    if truth.masks.shape[1:] != tuple(store.header.canvas):
        raise DataError(
            f"the store's segments are of {store.header.canvas} px, "
            f"the truth of {truth.masks.shape[1:]} px",
            "extract with the demo's own size",
        )
    rows = {_key(name): row for row, name in enumerate(truth.names)}
    classes, counts = [], []
    for class_id, name in enumerate(store.header.classes):
        found = store.concepts(class_id)
        on_object = _on_object(found.segments, images, truth, rows)
        pixels = np.stack([on_object, found.segments.area])
        members = [concept.members for concept in found.concepts]
        chosen = pixels[:, np.concatenate([np.empty(0, np.int32), *members])].sum(axis=1)
        counts.append([chosen, pixels.sum(axis=1)])
        classes.append(ClassPrecision(name, _share(chosen), _share(pixels.sum(axis=1))))
    chosen, everything = np.sum(counts, axis=0)
    return Precision(_share(chosen), _share(everything), tuple(classes))


@dataclass(frozen=True)
class _Look:
    outline: Drawing
    texture: Drawing | None
    hue: float
    share: tuple[float, float]


@cache
def _photographs() -> tuple[Pixels, ...]:
    return tuple(load_sample_images().images)


@cache
def _unit_area(outline: Drawing) -> float:
    axis = np.linspace(-1, 1, 512, dtype=np.float32)
    return 4 * float(outline(axis[None, :], axis[:, None]).mean())


def _paste(pixels: Pixels, look: _Look, rng: np.random.Generator) -> tuple[Pixels, Mask]:
    """Return `pixels` with a shape on it, and the pixels that the shape touches."""
    size = len(pixels)
    radius = size * np.sqrt(rng.uniform(*look.share) / _unit_area(look.outline))
    centre = rng.uniform(radius, size - radius, 2)
    low, high = np.floor(centre - radius).astype(int), np.ceil(centre + radius).astype(int)
    box = (slice(low[1], high[1]), slice(low[0], high[0]))
    colour, coverage = _shape(look, (radius, centre - low, *(high - low)), rng)
    touched = np.zeros((size, size), np.bool_)
    touched[box] = coverage > 0
    made = pixels.copy()
    made[box] = np.rint(pixels[box] * (1 - coverage[..., None]) + colour)
    return made, touched


def _shape(
    look: _Look, place: tuple[float, Array, int, int], rng: np.random.Generator
) -> tuple[Plane, Plane]:
    """Return colour times coverage, float32[h w 3], and coverage, float32[h w].

    `place`: radius, centre x and y, w and h, in pixels.
    """
    radius, centre, width, height = place
    fine_x, fine_y = (
        ((np.arange(extent * OVERSAMPLE, dtype=np.float32) + 0.5) / OVERSAMPLE - middle) / radius
        for extent, middle in zip((width, height), centre, strict=True)
    )
    angle, mirror = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1])
    x = mirror * (fine_x * np.cos(angle) + fine_y[:, None] * np.sin(angle))
    y = fine_y[:, None] * np.cos(angle) - fine_x * np.sin(angle)
    first, second, edge = _colours(look.hue, rng)
    inside = look.outline(x, y)
    framed = np.pad(inside, 1).view(np.uint8)  # an edge also where the shape meets its box
    core = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=3)[1:-1, 1:-1] > 0
    colour = np.where(look.texture(x, y)[..., None], second, first) if look.texture else first
    colour = np.where(core[..., None], colour, edge) * inside[..., None]
    return _shrink(colour), _shrink(inside)


def _shrink(fine: Array) -> Plane:
    height, width = (extent // OVERSAMPLE for extent in fine.shape[:2])
    small = cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _colours(hue: float, rng: np.random.Generator) -> Plane:
    """Return a bright colour, one in contrast, and a dark one for the edge, float32[3 3]."""
    bright = (hue, rng.uniform(0.7, 0.95), rng.uniform(0.85, 1.0))
    if rng.random() < 0.5:
        other = ((hue + rng.uniform(120, 240)) % 360, rng.uniform(0.5, 0.9), rng.uniform(0.2, 0.35))
    else:
        other = (hue, rng.uniform(0.0, 0.15), rng.uniform(0.9, 1.0))
    edge = (hue, 0.6, 0.15)
    hsv = np.array([[bright, other, edge]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0] * 255, np.float32)


def _key(name: str) -> tuple[str, ...]:
    return Path(name).parts[-2:]


def _on_object(
    segments: Segments, images: "ImageSet", truth: Truth, rows: dict[tuple[str, ...], int]
) -> Array:
    """Return how many pixels of each segment lie on its image's object, int64[m]."""
    on_object = np.zeros(len(segments), np.int64)
    for index, (image, (top, left, bottom, right)) in enumerate(
        zip(segments.image, segments.box, strict=True)
    ):
        name = images.names[image]
        if _key(name) not in rows:
            raise DataError(f"the truth has no image {name}", "extract from the demo's own images")
        evidence = truth.masks[rows[_key(name)], top:bottom, left:right]
        on_object[index] = np.count_nonzero(segments.mask(index) & evidence)
    return on_object


def _share(counts: Array) -> float:
    on_object, area = counts
    return float(on_object / area) if area else float("nan")
