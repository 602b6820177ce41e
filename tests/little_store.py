"""A small store of patches of the tiny images, and what material gives of it as pixels."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dop_fast.concepts.segments import collect
from dop_fast.config import DataConfig, ExtractConfig, PruneConfig
from dop_fast.images import ImageSet
from dop_fast.patches import material
from dop_fast.patches.material import Material
from dop_fast.stores import PatchStore
from dop_fast.types import Array, ClassConcepts, Concept

CPU = torch.device("cpu")
SIZE, FILL, CLASSES = 32, 117, 3


def concepts_of(images: ImageSet, class_id: int) -> ClassConcepts:
    """Return a class's images cut into 4 x 4 tiles, the first 24 of them as 3 concepts."""
    own = images.of_class(class_id)[:4]
    row = np.arange(SIZE) // 8
    labels = np.broadcast_to(row[:, None] * 4 + row, (len(own), 1, SIZE, SIZE))
    segments = collect(labels, (15,), ExtractConfig(min_area=0.0))
    members = np.random.default_rng(class_id).permutation(len(segments)).astype(np.int32)
    concepts = tuple(
        Concept(members[8 * rank : 8 * rank + 8], 0.9, np.full(3, 0.9), 0.0, 0.9)
        for rank in range(3)
    )
    segments = replace(segments, image=own[segments.image].astype(np.int32))
    return ClassConcepts(class_id, segments, concepts)


def gather(
    kind: str, store: PatchStore | None, images: ImageSet, data: DataConfig, **settings: int
) -> Material:
    config = PruneConfig(**{"per_class": 5, "batch_size": 4, **settings})
    return material.gather(kind, store, images, data, config, seed=0, device=CPU)


def normal(pixels: Array, data: DataConfig) -> Array:
    """Return float64[n 3 h w] from uint8[n h w 3]."""
    scaled = (pixels / 255.0 - np.array(data.mean)) / np.array(data.std)
    return scaled.transpose(0, 3, 1, 2)


def denormal(batches: Iterable[tuple[Tensor, Tensor]], data: DataConfig) -> list[tuple[int, Array]]:
    """Return label and uint8[h w 3] of every item."""
    items = []
    for pixels, labels in batches:
        scaled = pixels.double().numpy().transpose(0, 2, 3, 1)
        exact = (scaled * np.array(data.std) + np.array(data.mean)) * 255
        rounded = np.rint(exact)
        assert abs(exact - rounded).max() < 1e-3
        items += list(zip(labels.tolist(), rounded.astype(np.uint8), strict=True))
    return items


def all_of(images: ImageSet) -> Iterator[Array]:
    return iter(images.load(np.arange(len(images))))


def on_fill(found: ClassConcepts, index: int, images: ImageSet) -> bytes:
    top, left, bottom, right = found.segments.box[index]
    pixels = np.full((SIZE, SIZE, 3), FILL, np.uint8)
    image = images.load([found.segments.image[index]])[0]
    pixels[top:bottom, left:right] = image[top:bottom, left:right]  # tiles fill their boxes
    return pixels.tobytes()
