"""What clusters and separators see of a segment: its own forward, or its region of the image's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dop_fast.concepts.activations import Probe, pool
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.errors import ModelError
from dop_fast.images import normalise
from dop_fast.kernels.compose import Entry, compose
from dop_fast.types import Array, Segments

KEPT_BYTES = 2 << 30
"""Maps of a class's segments up to this size are kept, so that no member is forwarded twice."""
CPU_PIXELS = 16 * 224 * 224
"""A CPU takes batches of up to this many: activations of larger ones leave its caches."""


@dataclass(frozen=True)
class Seen:
    """Segments in the network: `pooled` float32[m c] to cluster, and `rows` of int[k] to separate.

    `rows` gives [k d], float32 or bfloat16 as the network computes, on its device, in the space of
    `Features.gradients`. They come from memory until other segments are seen.
    """

    pooled: Tensor
    rows: Callable[[Array], Tensor]


class Features(Protocol):
    """A way to see segments and photos in the network."""

    def segments(self, sources: Array, segments: Segments) -> Seen:
        """See `segments` of `sources` uint8[n h w 3]."""
        ...

    def photos(self, pixels: Array) -> Tensor:
        """See whole photos uint8[n h w 3] as rows, as those of `Seen`."""
        ...

    def gradients(self, pixels: Array, class_id: int) -> Tensor:
        """Return `Probe.gradients` of photos uint8[n h w 3] in the space of rows, float32[n d]."""
        ...


@dataclass(eq=False)
class Exact:
    """Each segment alone, stretched to the whole input, as in ACE; rows are whole maps."""

    probe: Probe
    data: DataConfig
    config: ExtractConfig
    _memory: Tensor | None = field(default=None, init=False)
    _shown: Segments | None = field(default=None, init=False)

    def segments(self, sources: Array, segments: Segments) -> Seen:
        """Forward every segment once; the maps are kept as 16 bits within `KEPT_BYTES`."""
        on_device = torch.from_numpy(sources).to(self.probe.device)
        pooled: list[Tensor] = []
        kept: Tensor | None = None
        start, self._shown = 0, segments
        for activation in self.probe.activations(
            self._composed(on_device, segments, np.arange(len(segments)))
        ):
            pooled.append(pool(activation))
            maps = flat(activation)
            if not start:
                kept = self._room(len(segments), maps)
            if kept is not None:
                kept[start : start + len(maps)] = _narrow(maps, kept.dtype)
            start += len(maps)

        def rows(index: Array) -> Tensor:
            if kept is not None and self._shown is segments:
                taken = kept[torch.from_numpy(index).to(kept.device)]
                return taken.float() if taken.dtype == torch.float16 else taken
            found = self.probe.activations(self._composed(on_device, segments, index))
            return torch.cat([flat(maps) for maps in found])

        return Seen(torch.cat(pooled), rows)

    def _room(self, count: int, maps: Tensor) -> Tensor | None:
        """Return memory for `count` maps, that of the class before if it suffices.

        None if they are too many. Fresh memory takes 40 times as long to write.
        """
        needed = count * maps.shape[1]
        if 2 * needed > KEPT_BYTES:
            return None
        dtype = torch.bfloat16 if maps.dtype == torch.bfloat16 else torch.float16
        memory = self._memory
        if memory is None or len(memory) < needed or memory.dtype != dtype:
            self._memory = memory = _fresh(needed, dtype, maps.device)
        return memory[:needed].view(count, -1)

    def photos(self, pixels: Array) -> Tensor:
        """Return whole maps."""
        batches = _entered(self.probe, self.data, self.config, pixels)
        return torch.cat([flat(maps) for maps in self.probe.activations(batches)])

    def gradients(self, pixels: Array, class_id: int) -> Tensor:
        """Return the gradients in whole maps."""
        batches = _entered(self.probe, self.data, self.config, pixels)
        return flat(self.probe.gradients(batches, class_id, self.config.gradient))

    def _composed(self, sources: Tensor, segments: Segments, index: Array) -> Iterator[Tensor]:
        """Yield batches, in the memory of those that `Probe.activations` is done with."""
        size = sources.shape[1]
        most = at_once(self.config, size, self.probe.device)
        entry = Entry(size, self.config.fill, self.data.mean, self.data.std)
        shape = (self.probe.ahead, min(most, len(index)), size, size, 3)
        memory = cycle(torch.empty(shape, dtype=self.probe.dtype, device=sources.device))
        for start in range(0, len(index), most):
            out = next(memory)
            yield compose(sources, segments, index[start : start + most], entry, out)


@dataclass(frozen=True)
class Roi:
    """One forward for the whole image; a segment is the mean of the map under its mask.

    Clusters and separators see these means, float32[c]. A step along a separator is taken at
    every position of the map alike, so gradients are summed over the positions. Another
    definition than ACE's, in which a segment also sees its surroundings, but far quicker.
    """

    probe: Probe
    data: DataConfig
    config: ExtractConfig

    def segments(self, sources: Array, segments: Segments) -> Seen:
        """Pool each image's map under the masks, weighted by the area they share with a cell."""
        maps = self._maps(sources)
        weights = torch.from_numpy(cells(segments, tuple(maps.shape[2:]))).to(maps.device)
        ends = np.searchsorted(segments.image, np.arange(len(sources) + 1))
        pooled = torch.cat(
            [
                weights[start:end] @ image.flatten(1).T
                for image, start, end in zip(maps, ends[:-1], ends[1:], strict=True)
            ]
        )
        return Seen(pooled, lambda index: pooled[torch.from_numpy(index).to(pooled.device)])

    def photos(self, pixels: Array) -> Tensor:
        """Return the means of whole maps."""
        return pool(self._maps(pixels))

    def gradients(self, pixels: Array, class_id: int) -> Tensor:
        """Return the gradients summed over positions."""
        batches = _entered(self.probe, self.data, self.config, pixels)
        return self.probe.gradients(batches, class_id, self.config.gradient).sum(dim=(2, 3))

    def _maps(self, pixels: Array) -> Tensor:
        batches = _entered(self.probe, self.data, self.config, pixels)
        maps = torch.cat([maps.float() for maps in self.probe.activations(batches)])
        if maps.dim() != 4:
            raise ModelError(
                f"layer {self.probe.layer} gives no map to pool under a mask",
                "see each segment by itself: dopfast extract --features exact",
            )
        return maps


def _entered(
    probe: Probe, data: DataConfig, config: ExtractConfig, pixels: Array
) -> Iterator[Tensor]:
    """Yield photos batch by batch as they enter the network."""
    most = at_once(config, pixels.shape[1], probe.device)
    for start in range(0, len(pixels), most):
        part = torch.from_numpy(pixels[start : start + most]).to(probe.device)
        yield normalise(part, data.mean, data.std)


def at_once(config: ExtractConfig, size: int, device: torch.device) -> int:
    """Return how many images of `size` x `size` pixels make a batch on the device."""
    fits = max(1, CPU_PIXELS // size**2) if device.type == "cpu" else config.batch_size
    return min(config.batch_size, fits)


def _fresh(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":  # NumPy asks for large pages, twice as quick to write first
        return torch.from_numpy(np.empty(count, np.uint16)).view(dtype)
    return torch.empty(count, dtype=dtype, device=device)


def _narrow(maps: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return maps if maps.dtype == dtype else maps.clamp(-most, most)


def flat(activation: Tensor) -> Tensor:
    """Return one row per image; channels go last, as they lie in memory."""
    last = activation.permute(0, 2, 3, 1) if activation.dim() == 4 else activation
    return last.flatten(1)


def cells(segments: Segments, grid: tuple[int, ...]) -> NDArray[np.float32]:
    """Return which share of each segment's area lies in each cell of a grid, float32[m h*w]."""
    height, width = segments.canvas
    down, along = _overlaps(height, grid[0]), _overlaps(width, grid[1])
    shares = np.empty((len(segments), *grid), np.float32)
    for i, (top, left, bottom, right) in enumerate(segments.box):
        mask = segments.mask(i).astype(np.float32)
        shares[i] = down[:, top:bottom] @ mask @ along[:, left:right].T
    shares /= segments.area[:, None, None]
    return shares.reshape(len(segments), -1)


@lru_cache(maxsize=4)
def _overlaps(pixels: int, cells: int) -> NDArray[np.float32]:
    """Return the share of each pixel of a line that lies in each cell, float32[cells pixels]."""
    edge, pixel = np.arange(cells + 1)[:, None] * (pixels / cells), np.arange(pixels)
    shares: NDArray[np.float32] = np.diff(np.clip(edge - pixel, 0, 1), axis=0).astype(np.float32)
    return shares
