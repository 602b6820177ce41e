"""Batches of pixels, on the device: from memory where the set is small, else read as needed."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dop_fast import ranks, seeding
from dop_fast.errors import DataError, DopFastError
from dop_fast.images import ImageSet
from dop_fast.training import augment
from dop_fast.types import Array, Track, untracked

HOLD_BYTES = 2**30
MOST_READERS = 16
CHUNK = 256  # images read at a time to fill the memory
UNREADABLE_SHARE = 0.01  # of a set's images; more of them stop a training
Failed: TypeAlias = dict[int, DataError]
"""By row of what was read, or by index, why it is not an image."""
Read: TypeAlias = Callable[[Array], tuple[Array, Failed]]
"""From indices int64[k] to pixels uint8[k s s 3]."""
Parts: TypeAlias = Iterator[tuple[Array, Tensor]]
"""Indices int64[k], and pixels uint8[k s s 3] of theirs."""


@dataclass(frozen=True)
class Pixels:
    """The images of a set as `load` gives them; those in `unreadable`, by index, are left out.

    What cannot be read is found when it is needed. Where it is more than `UNREADABLE_SHARE` of
    the set, whatever reads raises DataError.
    """

    images: ImageSet
    workers: int
    device: torch.device
    unreadable: dict[int, DataError] = field(default_factory=dict)
    track: Track = untracked

    @cached_property
    def held(self) -> Tensor | None:
        """All pixels, uint8[n s s 3] on the device, or None where they are too many."""
        count, size = len(self.images), self.images.size
        if count * size * size * 3 > HOLD_BYTES:
            return None
        held = torch.zeros(count, size, size, 3, dtype=torch.uint8, device=self.device)
        chunks = split(np.arange(count), CHUNK)
        parts = self.fetch(self.images.attempt, chunks)
        for index, part in self.track(parts, "reading images", len(chunks)):
            held[self.send(index)] = part
        return held

    def batches(self, chunks: Sequence[Array]) -> Parts:
        """Yield what can be read of each chunk of indices, and its pixels uint8[k s s 3]."""
        held = self.held
        if held is None:
            yield from self.fetch(self.images.attempt, chunks)
        else:
            for chunk in map(self.readable, chunks):
                yield chunk, held[self.send(chunk)]

    def readable(self, chunk: Array) -> Array:
        """Return the indices of a chunk without those that are known to be unreadable."""
        return chunk[[int(i) not in self.unreadable for i in chunk]] if self.unreadable else chunk

    def fetch(self, read: Read, chunks: Sequence[Array]) -> Parts:
        """Yield what `read` gives of each chunk, in order, and of which indices.

        Workers, if there are any, read ahead.
        """
        loader = DataLoader(
            _Chunks(read, chunks),
            batch_size=None,
            num_workers=readers(self.workers, self.device),
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global stream
        )
        for chunk, found in zip(chunks, loader, strict=True):
            if isinstance(found, DopFastError):
                raise found
            pixels, failed = found
            if failed:
                self._leave_out({int(chunk[row]): error for row, error in failed.items()})
                good = np.setdiff1d(np.arange(len(chunk)), list(failed))
                chunk, pixels = chunk[good], pixels[torch.from_numpy(good)]
            yield chunk, pixels.to(self.device, non_blocking=True)

    def agree(self) -> None:
        """Learn from the other ranks what they could not read."""
        for found in ranks.gather(dict(self.unreadable)):
            self._leave_out(found)

    def _leave_out(self, found: Failed) -> None:
        self.unreadable.update(found)
        count, total = len(self.unreadable), len(self.images)
        if count > UNREADABLE_SHARE * total:
            first = "; ".join(str(self.unreadable[i]) for i in sorted(self.unreadable)[:3])
            share = f"{count} of {total} images, more than {UNREADABLE_SHARE:.0%}"
            raise DataError(
                f"{share}, are unreadable: {first}",
                "remove or replace them",
            )

    def send(self, values: Array) -> Tensor:
        """Return an array as a tensor on the device."""
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def labels(self, chunk: Array) -> Tensor:
        """Return the labels at `chunk`, int64[k]."""
        return self.send(self.images.labels[chunk])


@dataclass(frozen=True)
class _Chunks(Dataset[tuple[Array, Failed] | DopFastError]):
    read: Read
    chunks: Sequence[Array]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, position: int) -> tuple[Array, Failed] | DopFastError:
        try:
            return self.read(self.chunks[position])
        except DopFastError as error:  # raised in a worker, it would lose its hint
            return error


def readers(workers: int, device: torch.device) -> int:
    """Return how many processes load images; `workers` as in `TrainConfig`."""
    if workers >= 0 or device.type != "cuda":
        return max(0, workers)
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_READERS, max(1, (free or 1) // torch.cuda.device_count()))


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


def own_part(batch: Array) -> Array:
    """Return this rank's part of a batch: two images or more, as batch norm needs, or none."""
    world = ranks.here()
    parts = np.array_split(batch, min(world.count, max(1, len(batch) // 2)))
    return parts[world.rank] if world.rank < len(parts) else batch[:0]


def training_batches(
    pixels: Pixels,
    chunks: Sequence[Array],
    augmentation: str,
    seed: int,
    epoch: int,
    *,
    erasing: float = 0.0,
    fill: Sequence[float] = (0, 0, 0),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented pixels uint8[k s s 3] and labels int64[k] of each chunk, on the device.

    An image's augmentation follows from the seed, the epoch and its index alone. A share `erasing`
    of the images loses a box to the colour `fill`, in [0, 1]. Images that cannot be read are left
    out, and so is what they leave of a chunk if that is one image: batch norm cannot train on it.
    Nothing may be left.
    """
    kind = augment.resolve(augmentation, pixels.images.size)
    if kind == "resized":
        parts = pixels.fetch(partial(augment.resized, pixels.images, seed, epoch), chunks)
    elif kind == "pad":
        parts = _shifted(pixels, chunks, seed, epoch)
    else:
        parts = pixels.batches(chunks)
    if erasing:
        count, size = len(pixels.images), pixels.images.size
        parts = _erased(
            pixels, parts, augment.draw_erasures(count, size, erasing, seed, epoch), fill
        )
    for chunk, (index, part) in zip(chunks, parts, strict=True):
        left = index if len(index) == len(chunk) or len(index) > 1 else index[:0]
        yield part[: len(left)], pixels.labels(left)


def _shifted(pixels: Pixels, chunks: Sequence[Array], seed: int, epoch: int) -> Parts:
    shift, flip = augment.draw_shifts(len(pixels.images), pixels.images.size, seed, epoch)
    held = pixels.held
    if held is None:
        read = pixels.fetch(pixels.images.attempt, chunks)
        parts = ((index, part, np.arange(len(index))) for index, part in read)
    else:
        parts = ((index, held, index) for index in map(pixels.readable, chunks))
    for index, part, rows in parts:
        drawn = pixels.send(shift[index]), pixels.send(flip[index])
        yield index, augment.shifted(part, pixels.send(rows), *drawn)


def _erased(pixels: Pixels, parts: Parts, box: Array, fill: Sequence[float]) -> Parts:
    colour = pixels.send(np.round(255 * np.array(fill)).astype(np.uint8))
    for index, part in parts:
        yield index, augment.erased(part, pixels.send(box[index]), colour)
