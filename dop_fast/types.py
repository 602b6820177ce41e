"""The nouns that the stages hand to each other: structures of arrays, checked once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Array: TypeAlias = NDArray[Any]
Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""Images float[n 3 h w], normalised, and labels int64[n]."""
Batches: TypeAlias = Iterable[Batch]
"""Can be iterated again; each iteration gives the same batches."""
Loss: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""From logits [n classes] and labels [n] to the mean over the batch."""
Scores: TypeAlias = "dict[str, Tensor]"
"""By parameter name, shaped as the weight, finite, detached; higher = keep."""


@runtime_checkable
class Watched(Protocol):
    """Batches that hear of it when one is worked on again without being read."""

    def again(self, at: int) -> None:
        """Hear of the one at this place."""
        ...


class Track(Protocol):
    """Passes items on and may show how far it is."""

    def __call__(
        self, items: Iterable[T], label: str | Callable[[T], str], total: int
    ) -> Iterable[T]:
        """Yield every item. A label that is made from it says what is being worked on."""
        ...


def untracked(items: Iterable[T], label: str | Callable[[T], str], total: int) -> Iterable[T]:
    """Pass items on and show nothing."""
    return items


@dataclass(frozen=True)
class Segments:
    """SLIC regions of several images, each a box and a bit mask inside that box.

    `image` int32[m]: index into the image set. `box` int32[m 4]: top, left, bottom, right, the
    last two exclusive. `resolution` int16[m]: the n_segments that the region came from. `offset`
    int64[m+1]: where a region's bytes start in `bits` uint8[...], which is `np.packbits` of the
    mask inside the box, row by row, each region starting at a new byte. `canvas`: height and
    width of the images.
    """

    image: Array
    box: Array
    resolution: Array
    offset: Array
    bits: Array
    canvas: tuple[int, int]

    def __len__(self) -> int:
        return len(self.image)

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Return the mask inside the region's box, bool[bottom-top right-left]."""
        top, left, bottom, right = self.box[index]
        shape = (int(bottom - top), int(right - left))
        bits = self.bits[self.offset[index] : self.offset[index + 1]]
        return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).view(np.bool_)

    @cached_property
    def area(self) -> NDArray[np.int64]:
        """Pixels of each region, int64[m]."""
        counts = np.concatenate([[0], np.cumsum(np.bitwise_count(self.bits), dtype=np.int64)])
        return np.asarray(np.diff(counts[self.offset]), dtype=np.int64)

    def select(self, index: Array) -> "Segments":
        """Return the regions at `index` int[k], in that order."""
        index = np.asarray(index, dtype=np.int64)
        parts = [self.bits[self.offset[i] : self.offset[i + 1]] for i in index]
        offset = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        bits = np.concatenate(parts) if parts else self.bits[:0]
        return Segments(
            self.image[index], self.box[index], self.resolution[index], offset, bits, self.canvas
        )


@dataclass(frozen=True)
class Concept:
    """A cluster of segments with one meaning for one class.

    `members` int32[m] index the class's `Segments`, nearest to the cluster's centre first.
    `tcav` is Eq. 5, the mean of `tcav_runs` float64[r] over random sets; `p_value` tests them
    against chance; `cav_accuracy` is the separators' mean accuracy on held-out data.
    """

    members: Array
    tcav: float
    tcav_runs: Array
    p_value: float
    cav_accuracy: float

    def significant(self, alpha: float) -> bool:
        """Return whether the TCAV score beats chance at level `alpha`."""
        return self.p_value < alpha  # NaN is not significant


@dataclass(frozen=True)
class ClassConcepts:
    """What extraction found in one class: all its segments, and its concepts, best first."""

    class_id: int
    segments: Segments
    concepts: tuple[Concept, ...]


@dataclass(frozen=True)
class Patches:
    """Images of pasted segments (DOP, stitched) with their valid pixels.

    `pixels` uint8[n h w 3], the fill value where `valid` bool[n h w] is false; `label` int64[n];
    `reached` bool[n]: whether the coverage asked for was reached (always true for DOP patches).
    `visible` float32[n k], of stitched ones: the share of pixels that each concept is seen in,
    the most important one first, NaN where the class has fewer.
    """

    pixels: Array
    valid: Array
    label: Array
    reached: Array
    visible: Array | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def coverage(self) -> NDArray[np.float64]:
        """Share of valid pixels r(c), Eq. 6, float64[n]."""
        counts = [np.count_nonzero(valid) for valid in self.valid]  # several times as fast as mean
        return np.array(counts, np.float64) / np.prod(self.valid.shape[1:])
