"""Batches of pixels, on the device: from memory where the set is small, else read as needed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dop_fast import seeding
from dop_fast.errors import DopFastError
from dop_fast.images import ImageSet
from dop_fast.training import augment
from dop_fast.types import Array

HOLD_BYTES = 2**30
CHUNK = 256  # images read at a time to fill the memory
Read: TypeAlias = Callable[[Array], Array]
"""From indices int64[k] to pixels uint8[k s s 3]."""


@dataclass(frozen=True)
class Pixels:
    """The images of a set as `load` gives them."""

    images: ImageSet
    workers: int
    device: torch.device

    @cached_property
    def held(self) -> Tensor | None:
        """All pixels, uint8[n s s 3] on the device, or None where they are too many."""
        count, size = len(self.images), self.images.size
        if count * size * size * 3 > HOLD_BYTES:
            return None
        held = torch.empty(count, size, size, 3, dtype=torch.uint8, device=self.device)
        chunks = split(np.arange(count), CHUNK)
        for chunk, part in zip(chunks, self.fetch(self.images.load, chunks), strict=True):
            held[int(chunk[0]) : int(chunk[-1]) + 1] = part
        return held

    def batches(self, chunks: Sequence[Array]) -> Iterator[Tensor]:
        """Yield the pixels of each chunk of indices, uint8[k s s 3]."""
        held = self.held
        if held is None:
            yield from self.fetch(self.images.load, chunks)
        else:
            for chunk in chunks:
                yield held[self.send(chunk)]

    def fetch(self, read: Read, chunks: Sequence[Array]) -> Iterator[Tensor]:
        """Yield `read(chunk)` for each chunk, in order; workers, if there are any, read ahead."""
        loader = DataLoader(
            _Chunks(read, chunks),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global stream
        )
        for pixels in loader:
            if isinstance(pixels, DopFastError):
                raise pixels
            yield pixels.to(self.device, non_blocking=True)

    def send(self, values: Array) -> Tensor:
        """Return an array as a tensor on the device."""
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def labels(self, chunk: Array) -> Tensor:
        """Return the labels at `chunk`, int64[k]."""
        return self.send(self.images.labels[chunk])


@dataclass(frozen=True)
class _Chunks(Dataset[Array | DopFastError]):
    read: Read
    chunks: Sequence[Array]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, position: int) -> Array | DopFastError:
        try:
            return self.read(self.chunks[position])
        except DopFastError as error:  # raised in a worker, it would lose its hint
            return error


def split(order: Array, batch_size: int) -> list[Array]:
    """Cut indices into batches; the last one may be smaller."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def training_order(count: int, batch_size: int, seed: int, epoch: int) -> list[Array]:
    """Shuffle the epoch's images into batches.

    A last batch of one image is left out: batch norm cannot train on it.
    """
    chunks = split(seeding.stream(seed, "order", epoch).permutation(count), batch_size)
    lonely = len(chunks[-1]) == 1 and 1 < batch_size < count
    return chunks[:-1] if lonely else chunks


def training_batches(
    pixels: Pixels, chunks: list[Array], augmentation: str, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented pixels uint8[k s s 3] and labels int64[k] of each chunk, on the device.

    An image's augmentation follows from the seed, the epoch and its index alone.
    """
    kind = augment.resolve(augmentation, pixels.images.size)
    if kind == "resized":
        parts = pixels.fetch(partial(augment.resized, pixels.images, seed, epoch), chunks)
    elif kind == "pad":
        parts = _shifted(pixels, chunks, seed, epoch)
    else:
        parts = pixels.batches(chunks)
    for chunk, part in zip(chunks, parts, strict=True):
        yield part, pixels.labels(chunk)


def _shifted(pixels: Pixels, chunks: list[Array], seed: int, epoch: int) -> Iterator[Tensor]:
    count, size = len(pixels.images), pixels.images.size
    shift, flip = augment.draw_shifts(count, size, seed, epoch)
    held = pixels.held
    parts = pixels.fetch(pixels.images.load, chunks) if held is None else (held for _ in chunks)
    for chunk, part in zip(chunks, parts, strict=True):
        index = chunk if held is not None else np.arange(len(chunk))
        drawn = pixels.send(shift[chunk]), pixels.send(flip[chunk])
        yield augment.shifted(part, pixels.send(index), *drawn)
