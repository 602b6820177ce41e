"""Cover and paint in Numba, one core: a stitched patch costs less than waking a second one."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dop_fast.kernels.paste._lanes import LANES, PIXELS, load, overlay, spread, store
from dop_fast.types import Array, Segments

# Numba turns a sum of uint64 and int64 into a float, and checks signed indices for wrapping.
ONE, THREE, SEVEN, EIGHT = np.uint64(1), np.uint64(3), np.uint64(7), np.uint64(8)
WORD = np.uint64(64)


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
    size = math.prod(shape)
    source, end = np.ascontiguousarray(sources).reshape(-1), np.zeros(2 * LANES, np.uint8)
    end[LANES - min(LANES, len(source)) : LANES] = source[-LANES:]
    # vectors reach beyond the last pixel
    pixels, valid = np.empty(3 * size + LANES, np.uint8), np.empty(size + LANES, np.uint8)
    _paint(
        _words(*columns),
        (np.ascontiguousarray(segments.image, np.int32), source, end),
        (np.asarray(placements, np.int64), starts),
        (pixels, valid),
        np.uint8(fill),
        segments.canvas,
    )
    return pixels[: 3 * size].reshape(*shape, 3), valid[:size].reshape(shape).view(np.bool_)


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

    Masks meet in a canvas of bits whose rows start at a byte: bit b of word k is column
    8 * first + 64 k + b. `place` uint64[m 5]: top, bottom, first, words in a row, start in
    `words` uint64[...].
    """
    place = np.empty((len(box), 5), np.uint64)
    total = 0
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        many = (right - (left & ~7) + 63) >> 6
        place[i, 0], place[i, 1], place[i, 2] = top, bottom, left >> 3
        place[i, 3], place[i, 4] = many, total
        total += (bottom - top) * many
    bits = _lowest_first(bits)
    words = np.empty(total, np.uint64)
    at = np.uint64(0)
    for i in range(len(box)):
        top, left, bottom, right = box[i]
        width, before = np.int64(right - left), np.int64(left & 7)
        for row in range(bottom - top):
            start = 8 * offset[i] + row * width
            words[at] = _read(bits, start, width) << np.uint64(before)
            at += ONE
            for column in range(64 - before, width, 64):
                words[at] = _read(bits, start + column, width - column)
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
def _empty(canvas: tuple[int, int]) -> tuple[Array, np.uint64]:
    """Return a canvas of bits, none set, with a word more for `load`, and its bytes in a row."""
    stride = (canvas[1] + 7) >> 3
    return np.zeros(canvas[0] * stride + 8, np.uint8), np.uint64(stride)


@njit(cache=True, nogil=True)
def _cover(
    masks: tuple[Array, Array], queue: Array, sigma: float, count: int, canvas: tuple[int, int]
) -> Array:
    place, words = masks
    area = canvas[0] * canvas[1]
    covered, stride = _empty(canvas)
    used = np.zeros(len(place), np.bool_)
    most = np.int64(0)
    for index in queue.flat:
        if not used[index]:
            used[index] = True
            most += _add(covered, stride, words, place[index])
            if most / area >= sigma:
                break  # enough: no canvas ends for having it all
    ends = np.empty(count, np.int64)
    done, total = 0, np.int64(0)
    covered[:] = 0
    for row in range(len(queue)):
        if done == count:
            break
        for index in queue[row]:
            total += _add(covered, stride, words, place[index])
        if total / area >= sigma or total == most:
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
    covered, stride = _empty(canvas)
    seen = np.zeros(len(placements), np.int64)
    for i in range(len(starts) - 1):
        covered[:] = 0
        for at in range(starts[i + 1] - 1, starts[i] - 1, -1):
            seen[at] = _add(covered, stride, words, place[placements[at]])
    return seen


@njit(cache=True, nogil=True)
def _add(covered: Array, stride: np.uint64, words: Array, place: Array) -> np.int64:
    """Mark a segment's pixels in a canvas of bits; return how many are new."""
    top, bottom, first, many, at = place
    new = np.uint64(0)
    row = covered.ctypes.data + top * stride + first
    for _ in range(top, bottom):
        for k in range(many):
            here = row + EIGHT * k
            held = load(here)
            new += _count(words[at] & ~held)
            store(here, held | words[at])
            at += ONE
        row += stride
    return np.int64(new)


@njit(cache=True, nogil=True)
def _paint(
    masks: tuple[Array, Array],
    sources: tuple[Array, Array, Array],
    order: tuple[Array, Array],
    made: tuple[Array, Array],
    fill: np.uint8,
    canvas: tuple[int, int],
) -> None:
    """Lay the last segment first, so that each pixel is copied once: the one that is seen.

    A canvas is filled, painted and left before the next one, while it lies in the cache.
    `sources`: image of each segment, pixels, the last of them; `order`: placements, starts;
    `made`: pixels, valid.
    """
    place, words = masks
    image, source, end = sources
    placements, starts = order
    pixels, valid = made
    size = np.uint64(canvas[0] * canvas[1])
    covered, stride = _empty(canvas)
    safe = np.uint64(source.ctypes.data) + np.uint64(len(source)) - np.uint64(LANES)
    for i in range(len(starts) - 1):
        covered[:] = 0
        begin = np.uint64(i) * size
        pixels[begin * THREE : (begin + size) * THREE] = fill
        target = pixels.ctypes.data + begin * THREE
        for at in range(starts[i + 1] - 1, starts[i] - 1, -1):
            index = placements[at]
            out_of = source.ctypes.data + np.uint64(image[index]) * size * THREE
            _lay(
                (words, place[index]),
                (np.uint64(covered.ctypes.data), stride),
                (target, np.uint64(canvas[1])),
                (out_of, safe, np.uint64(end.ctypes.data)),
            )
        _unpack(covered, stride, valid, begin, canvas)


@njit(cache=True, nogil=True)
def _lay(
    mask: tuple[Array, Array],
    covered: tuple[np.uint64, np.uint64],
    target: tuple[np.uint64, np.uint64],
    source: tuple[np.uint64, np.uint64, np.uint64],
) -> None:
    """Copy those of a segment's pixels that nothing covers, and mark them.

    Addresses: `covered` and its bytes in a row; `target` and its pixels in a row; of `source`,
    the image, the last place a vector may be read from, and where what is beyond stands again.
    """
    words, place = mask
    bits, stride = covered
    into, width = target
    out_of, safe, end = source
    top, bottom, first, many, at = place
    row, pixel = bits + top * stride + first, top * width + EIGHT * first
    for _ in range(top, bottom):
        for k in range(many):
            held = load(row + EIGHT * k)
            word = words[at] & ~held
            at += ONE
            if word == 0:
                continue
            store(row + EIGHT * k, held | word)
            skipped = _count((word & (~word + ONE)) - ONE)
            word >>= skipped
            here = (pixel + WORD * k + skipped) * THREE
            while word:
                there = out_of + here
                overlay(into + here, there if there <= safe else end + (there - safe), word)
                word >>= np.uint64(PIXELS)
                here += np.uint64(3 * PIXELS)
        row += stride
        pixel += width


@njit(cache=True, nogil=True)
def _unpack(
    covered: Array, stride: np.uint64, valid: Array, begin: np.uint64, canvas: tuple[int, int]
) -> None:
    """Write each pixel's bit as a byte; what overshoots a row, the next one overwrites."""
    row, into = np.uint64(covered.ctypes.data), valid.ctypes.data + begin
    width = np.uint64(canvas[1])
    for _ in range(canvas[0]):
        for k in range((width + WORD - ONE) // WORD):
            spread(into + WORD * k, load(row + EIGHT * k))
        row += stride
        into += width
