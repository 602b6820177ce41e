"""Cover and paint in Numba, one core: a stitched patch costs less than waking a second one."""

from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.core.cgutils import raw_memcpy
from numba.extending import intrinsic
from numpy.typing import NDArray

from dop_fast.types import Array, Segments

# Numba turns a sum of uint64 and int64 into a float, and checks signed indices for wrapping.
ONE, THREE, SEVEN = np.uint64(1), np.uint64(3), np.uint64(7)


def cover(segments: Segments, queue: Array, sigma: float, count: int) -> NDArray[np.int64]:
    """Return what `reference.cover` does."""
    masks = _words(*_columns(segments, queue))
    queue = np.ascontiguousarray(queue, np.int64)
    ends: NDArray[np.int64] = _cover(masks, queue, sigma, count, segments.canvas)
    return ends


def visible(segments: Segments, placements: Array, starts: Array) -> NDArray[np.int64]:
    """Return what `reference.visible` does."""
    masks = _words(*_columns(segments, placements))
    starts = _checked(starts, len(placements))
    seen: NDArray[np.int64] = _visible(
        masks, np.asarray(placements, np.int64), starts, segments.canvas
    )
    return seen


def paint(
    segments: Segments, sources: Array, placements: Array, starts: Array, fill: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return what `reference.paint` does."""
    columns = _columns(segments, placements)
    if sources.shape[1:] != (*segments.canvas, 3) or sources.dtype != np.uint8:
        raise ValueError(f"sources {sources.dtype}{sources.shape} do not fit {segments.canvas}")
    if np.any(segments.image < 0) or np.any(segments.image >= len(sources)):
        raise ValueError(f"segments of images that are not among the {len(sources)} sources")
    starts = _checked(starts, len(placements))
    shape = (len(starts) - 1, *segments.canvas)
    pixels, valid = np.full((*shape, 3), fill, np.uint8), np.zeros(shape, np.bool_)
    _paint(
        (*_runs(*columns, segments.canvas[1]), np.ascontiguousarray(segments.image, np.int32)),
        np.ascontiguousarray(sources).reshape(-1),
        np.asarray(placements, np.int64),
        starts,
        pixels.reshape(len(pixels), -1),
        valid.reshape(len(valid), -1),
    )
    return pixels, valid


def _checked(starts: Array, placements: int) -> NDArray[np.int64]:
    if not 0 <= starts[0] <= starts[-1] <= placements:
        raise ValueError(f"starts that do not fit {placements} placements")
    return np.asarray(starts, np.int64)


def _columns(segments: Segments, index: Array) -> tuple[Array, Array, Array]:
    """Return box, offset and bits; refuse what would make compiled code leave its arrays."""
    box = np.ascontiguousarray(segments.box, np.int32)
    offset = np.ascontiguousarray(segments.offset, np.int64)
    if not _fit(box, offset, len(segments.bits), segments.canvas):
        raise ValueError(f"segments that do not fit into their canvas, {segments.canvas}")
    if index.size and not 0 <= index.min() <= index.max() < len(segments):
        raise ValueError(f"an index that is not among {len(segments)} segments")
    return box, offset, segments.bits


@njit(cache=True, nogil=True)
def _fit(box: Array, offset: Array, stored: int, canvas: tuple[int, int]) -> bool:
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        if not (0 <= top < bottom <= canvas[0] and 0 <= left < right <= canvas[1]):
            return False
        end = offset[i] + ((bottom - top) * (right - left) + 7) // 8
        if not 0 <= offset[i] < end <= stored:
            return False
    return True


@njit(cache=True, nogil=True)
def _words(box: Array, offset: Array, bits: Array) -> tuple[Array, Array]:
    """Return every segment's mask in 64-bit words, of which one holds 64 pixels of a row.

    Bit b of word k is column 64 k + b of the canvas, so masks meet word by word. `place`
    uint64[m 5]: top, bottom, first word of a row, words in a row, start in `words` uint64[...].
    """
    place = np.empty((len(box), 5), np.uint64)
    total = 0
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        many = ((right - 1) >> 6) - (left >> 6) + 1
        place[i] = np.array([top, bottom, left >> 6, many, total])
        total += (bottom - top) * many
    bits = _lowest_first(bits)
    words = np.empty(total, np.uint64)
    at = np.uint64(0)
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        width = np.int64(right - left)
        for row in range(bottom - top):
            for k in range(left >> 6, ((right - 1) >> 6) + 1):
                column = np.int64(64 * k - left)  # of the word's lowest bit, inside the box
                inside = column if column > 0 else 0
                word = _read(bits, 8 * offset[i] + row * width + inside, width - inside)
                words[at] = word << np.uint64(inside - column)
                at += ONE
    return place, words


@njit(cache=True, nogil=True)
def _lowest_first(bits: Array) -> Array:
    """Return bytes whose first pixel is the lowest bit, and nine more, for `_read`."""
    made = np.zeros(len(bits) + 9, np.uint8)
    for i in range(len(bits)):
        byte = bits[i]
        byte = ((byte >> 1) & 0x55) | ((byte & 0x55) << 1)
        byte = ((byte >> 2) & 0x33) | ((byte & 0x33) << 2)
        made[i] = (byte >> 4) | (byte << 4)
    return made


@njit(cache=True, nogil=True)
def _read(bits: Array, position: int, many: int | np.int64) -> np.uint64:
    """Return up to 64 bits, `many`, from `position` of a stream, the first one lowest."""
    byte, shift = np.uint64(position) >> THREE, np.uint64(position) & SEVEN
    word = np.uint64(0)
    for i in range(8):  # LLVM makes one load of it
        word |= np.uint64(bits[byte + np.uint64(i)]) << np.uint64(8 * i)
    beyond = np.uint64(bits[byte + np.uint64(8)])
    word = (word >> shift) | ((beyond << ONE) << (np.uint64(63) - shift))
    return word if many >= 64 else word & ((ONE << np.uint64(many)) - ONE)


@njit(cache=True, nogil=True)
def _count(word: np.uint64) -> np.uint64:
    """Return the number of set bits; LLVM makes one instruction of it."""
    word -= (word >> ONE) & np.uint64(0x5555555555555555)
    pairs = np.uint64(0x3333333333333333)
    word = (word & pairs) + ((word >> np.uint64(2)) & pairs)
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _cover(
    masks: tuple[Array, Array], queue: Array, sigma: float, count: int, canvas: tuple[int, int]
) -> Array:
    place, words = masks
    height, width = canvas
    stride = (width + 63) >> 6
    covered = np.zeros(height * stride, np.uint64)
    used = np.zeros(len(place), np.bool_)
    for index in queue.flat:
        used[index] = True
    most = np.int64(0)
    for index in np.flatnonzero(used):
        most += _add(covered, np.uint64(stride), words, place[index])
    ends = np.empty(count, np.int64)
    done, total = 0, np.int64(0)
    covered[:] = 0
    for row in range(len(queue)):
        if done == count:
            break
        for index in queue[row]:
            total += _add(covered, np.uint64(stride), words, place[index])
        if total / (height * width) >= sigma or total == most:
            ends[done] = row + 1
            done, total = done + 1, np.int64(0)
            covered[:] = 0
    return ends[:done]


@njit(cache=True, nogil=True)
def _visible(
    masks: tuple[Array, Array], placements: Array, starts: Array, canvas: tuple[int, int]
) -> Array:
    """Lay the last segment first: what it still finds free is what is seen of it."""
    place, words = masks
    stride = (canvas[1] + 63) >> 6
    covered = np.zeros(canvas[0] * stride, np.uint64)
    seen = np.zeros(len(placements), np.int64)
    for i in range(len(starts) - 1):
        covered[:] = 0
        for at in range(starts[i + 1] - 1, starts[i] - 1, -1):
            seen[at] = _add(covered, np.uint64(stride), words, place[placements[at]])
    return seen


@njit(cache=True, nogil=True)
def _add(covered: Array, stride: np.uint64, words: Array, place: Array) -> np.int64:
    """Mark a segment's pixels in `covered` uint64[h * stride]; return how many are new."""
    top, bottom, first, many, at = place
    new = np.uint64(0)
    for row in range(top, bottom):
        begin = row * stride + first
        for k in range(begin, begin + many):
            fresh = words[at] & ~covered[k]
            covered[k] |= fresh
            new += _count(fresh)
            at += ONE
    return np.int64(new)


@njit(cache=True, nogil=True)
def _runs(box: Array, offset: Array, bits: Array, width: int) -> tuple[Array, Array]:
    """Return every segment as runs of pixels: where its runs start, and (pixel, length) of each.

    int64[m+1] and uint32[... 2]; a run ends at the latest after 64 pixels of the box's row.
    """
    most = 0
    for i in range(len(box)):
        most += (box[i, 2] - box[i, 0]) * ((box[i, 3] - box[i, 1] + 1) // 2)
    first, runs = np.zeros(len(box) + 1, np.int64), np.empty((most, 2), np.uint32)
    bits = _lowest_first(bits)
    made = np.uint64(0)
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        across = np.int64(right - left)
        for row in range(bottom - top):
            for column in range(0, across, 64):
                word = _read(bits, 8 * offset[i] + row * across + column, across - column)
                origin = np.uint64((top + row) * width + left + column)
                while word:
                    lowest = word & (~word + ONE)
                    rest = word & (word + lowest)  # the carry clears the lowest run
                    runs[made, 0] = origin + _count(lowest - ONE)
                    runs[made, 1] = _count(word ^ rest)
                    made += ONE
                    word = rest
        first[i + 1] = made
    return first, runs


@njit(cache=True, nogil=True)
def _paint(
    segments: tuple[Array, Array, Array],
    sources: Array,
    placements: Array,
    starts: Array,
    pixels: Array,
    valid: Array,
) -> None:
    first, runs, image = segments
    for i in range(len(pixels)):
        canvas, painted = pixels[i], valid[i]
        for j in range(starts[i], starts[i + 1]):
            index = placements[j]
            source = np.uint64(image[index]) * np.uint64(len(canvas))
            for run in range(np.uint64(first[index]), np.uint64(first[index + 1])):
                pixel, length = np.uint64(runs[run, 0]), np.uint64(runs[run, 1])
                begin = pixel * THREE
                _copy(canvas, begin, sources, source + begin, length * THREE)
                for k in range(pixel, pixel + length):
                    painted[k] = True


def _memcpy(context: Any, target: Any, to: Any, source: Any, start: Any, length: Any) -> Any:
    def make(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arrays = (
            context.make_array(signature.args[k])(context, builder, values[k]) for k in (0, 2)
        )
        into, out_of = (
            builder.gep(array.data, [at])
            for array, at in zip(arrays, (values[1], values[3]), strict=True)
        )
        raw_memcpy(builder, into, out_of, values[4], 1)  # type: ignore[no-untyped-call] # Numba's
        return context.get_dummy_value()

    return types.void(target, to, source, start, length), make


# copies target[to : to + length] = source[start : start + length]; runs are so short and uneven
# that a vectorised loop takes twice as long
_copy: Any = intrinsic(_memcpy)
