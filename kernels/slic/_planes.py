"""Images to blurred CIELAB planes and tiles, compiled: the first half of `reference.py`."""

import numpy as np

from dop_fast.kernels.slic import _lanes, reference
from dop_fast.kernels.slic._base import (
    HEIGHT,
    PIXELS,
    WIDTH,
    add,
    address,
    blank,
    ceil,
    compiled,
    tally_inside,
)  # fmt: skip
from dop_fast.types import Array

LANES = 32
CUBE_ROOT_BITS = reference.CUBE_ROOT_BITS


@compiled
def buffers(height: int, width: int) -> tuple[Array, Array, Array]:
    """Return planes with rows of whole vectors, tiles, and the tiles' sums."""
    count = ceil(height, HEIGHT) * ceil(width, WIDTH)
    planes = np.zeros((3, height, ceil(width, LANES) * LANES), np.int16)
    return planes, np.zeros((count, 2 * PIXELS), np.int32), np.empty((count, 6), np.int64)


@compiled
def blurred_lab(
    image: Array,
    tables: Array,
    weights: Array,
    columns: Array,
    rows: Array,
    across: Array,
    planes: Array,
) -> None:
    """Fill the planes int16[3 h w']; `across` holds them between the two passes."""
    height, width = image.shape[:2]
    radius, stride = len(weights), planes.shape[2]
    weight = np.uintp(weights.ctypes.data)
    packed, parts = np.zeros(stride, np.uint64), np.empty((3, stride), np.int32)
    padded = np.empty((3, stride + 2 * radius), np.int16)
    for y in range(height):
        _lab_row(image[y], tables, packed, parts, padded, radius)
        for channel in range(3):
            row = padded[channel]
            for x in range(radius):
                row[x] = row[radius + columns[x]]
                row[radius + width + x] = row[radius + columns[radius + width + x]]
            start, out = address(padded, channel), address(across[channel], radius + y)
            for x in range(0, 2 * stride, 2 * LANES):
                _lanes.smooth(
                    start + np.uintp(2 * radius + x), 2, weight, radius, out + np.uintp(x)
                )
    for channel in range(3):
        plane = across[channel]
        for y in range(radius):
            plane[y] = plane[radius + rows[y]]
            plane[radius + height + y] = plane[radius + rows[radius + height + y]]
        for y in range(height):
            start, out = address(plane, radius + y), address(planes[channel], y)
            for x in range(0, 2 * stride, 2 * LANES):
                _lanes.smooth(start + np.uintp(x), 2 * stride, weight, radius, out + np.uintp(x))


@compiled
def _lab_row(
    pixels: Array, tables: Array, packed: Array, parts: Array, out: Array, margin: int
) -> None:
    """Convert a row of uint8[w 3] to int16[3 w'] in separate loops: one width of lanes each."""
    for x in range(len(pixels)):
        packed[x] = tables[0, pixels[x, 0]] + tables[1, pixels[x, 1]] + tables[2, pixels[x, 2]]
    for x in range(len(packed)):
        parts[0, x] = packed[x] & np.uint64(0x1FFFFF)
        parts[1, x] = packed[x] >> np.uint64(21) & np.uint64(0x1FFFFF)
        parts[2, x] = packed[x] >> np.uint64(42)
    lightness, a, b = out[0][margin:], out[1][margin:], out[2][margin:]
    for x in range(len(packed)):
        fx, fy, fz = _root(parts[0, x]), _root(parts[1, x]), _root(parts[2, x])
        lightness[x] = _rounded(np.float32(64 * 116) * fy - np.float32(64 * 16))
        a[x] = _rounded(np.float32(64 * 500) * (fx - fy))
        b[x] = _rounded(np.float32(64 * 200) * (fy - fz))


@compiled
def _rounded(value: np.float32) -> np.int16:
    return np.int16(np.int32(value + np.float32(8192.5)) - np.int32(8192))


@compiled
def _root(part: np.int32) -> np.float32:
    t = np.float32(part) * np.float32(2.0**-20)
    third = np.float32(1 / 3)
    low = third * np.float32(1 / 1024)
    bits = np.float32(t if t > low else low).view(np.int32)
    r = np.int32(CUBE_ROOT_BITS - np.float32(bits) * third).view(np.float32)
    for _ in range(2):
        r = r * (np.float32(4 / 3) - t * third * r * (r * r))
    linear = np.float32(7.787) * t + np.float32(16 / 116)
    curved = t * (r * r)
    return curved if t > np.float32(0.008856) else linear


@compiled
def halve(planes: Array, height: int, width: int, small: Array) -> None:
    for channel in range(3):
        for y in range((height + 1) // 2):
            up, down = planes[channel, 2 * y], planes[channel, min(2 * y + 1, height - 1)]
            out = small[channel, y]
            for x in range(width // 2):
                total = np.int32(up[2 * x]) + up[2 * x + 1] + down[2 * x] + down[2 * x + 1]
                out[x] = (total + 2) >> 2
            if width % 2:
                out[width // 2] = (2 * (np.int32(up[width - 1]) + down[width - 1]) + 2) >> 2


@compiled
def tile_planes(planes: Array, height: int, width: int, tiles: Array, totals: Array) -> None:
    """Cut planes into tiles (see `_lanes`); `totals` int64[t 6]: sums of L, a, b, 1, x, y."""
    across = ceil(width, WIDTH)
    for y in range(height):
        rows = address(planes[0], y), address(planes[1], y), address(planes[2], y)
        for column in range(across):
            step = np.uintp(2 * WIDTH * column)
            tile = address(tiles, y // HEIGHT * across + column)
            tile += np.uintp(4 * WIDTH * (y % HEIGHT))
            _lanes.pack(rows[0] + step, rows[1] + step, rows[2] + step, tile)
    labels = np.zeros(PIXELS, np.int32)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        if top + HEIGHT > height or left + WIDTH > width:
            blank(labels, height - top, width - left)
        totals[index] = 0
        add(totals[index], tally_inside(address(tiles, index), labels, 0, left, top), 1)
        labels[:] = 0
