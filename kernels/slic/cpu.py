"""SLIC compiled: `reference.py` step by step, on tiles that stay in registers and cache.

Batches are split over threads, not Numba's `prange`: compiling is faster, and it may be called
from several threads at once.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from numba import get_num_threads, njit
from numpy.typing import NDArray

from dop_fast.kernels.slic import _lanes, reference
from dop_fast.types import Array

HEIGHT, WIDTH = reference.TILE_HEIGHT, reference.TILE_WIDTH
PIXELS, LANES = HEIGHT * WIDTH, 32
GRID = np.dtype(
    [
        ("height", np.int64),
        ("width", np.int64),
        ("clusters", np.int64),
        ("weight", np.float32),
        ("shift", np.int64),
        ("reach", np.int64),
    ]
)
TABLES = reference.lab_tables()
CUBE_ROOT_BITS = reference.CUBE_ROOT_BITS
_compiled = njit(cache=True, nogil=True, error_model="numpy")
_seeds = _compiled(reference.seeds)
_reached = _compiled(reference.tiles)
_reach_in_row = _compiled(reference.reach_in_row)
_cut = _compiled(reference.cut)


def slic(
    images: NDArray[np.uint8],
    n_segments: tuple[int, ...],
    compactness: float,
    sigma: float,
    iterations: int,
    coarse: bool,
) -> NDArray[np.int32]:
    """Return labels int32[n r h w] of `images` [n h w 3], equal to `reference.slic`."""
    count, height, width = images.shape[:3]
    labels = np.empty((count, len(n_segments), height, width), np.int32)
    weights = reference.taps(sigma)
    columns, rows = (reference.mirror(size, len(weights)) for size in (width, height))
    clusters = [min(asked, height * width) for asked in n_segments]
    fine, half = (
        np.array([reference.grid(h, w, k, compactness) for k in clusters], GRID)
        for h, w in ((height, width), ((height + 1) // 2, (width + 1) // 2))
    )
    halved = int(reference.COARSE_SHARE * iterations) if coarse else 0
    settings = (TABLES, weights, columns, rows, fine, half, iterations - halved, halved)
    images = np.ascontiguousarray(images)
    parts = min(get_num_threads(), count)
    if parts <= 1:
        _span(images, *settings, labels)
        return labels
    edges = [count * k // parts for k in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        spans = [slice(*edge) for edge in pairwise(edges)]
        list(pool.map(lambda span: _span(images[span], *settings, labels[span]), spans))
    return labels


@_compiled
def _span(
    images: Array,
    tables: Array,
    weights: Array,
    columns: Array,
    rows: Array,
    fine: Array,
    half: Array,
    iterations: int,
    halved: int,
    labels: Array,
) -> None:
    """Segment consecutive images with one set of buffers."""
    count, height, width = images.shape[:3]
    planes, tiles, totals = _buffers(height, width)
    small, small_tiles, small_totals = _buffers((height + 1) // 2, (width + 1) // 2)
    across = np.empty((3, height + 2 * len(weights), planes.shape[2]), np.int16)
    found = np.full((_ceil(height, HEIGHT) * HEIGHT, 1 + _ceil(width, 64) * 64), -1, np.int32)
    runs = np.empty((3, height * width), np.int32)
    for i in range(count):
        _blurred_lab(images[i], tables, weights, columns, rows, across, planes)
        _tile(planes, height, width, tiles, totals)
        if halved > 0:
            _halve(planes, height, width, small)
            _tile(small, (height + 1) // 2, (width + 1) // 2, small_tiles, small_totals)
        for j in range(len(fine)):
            colours, places = _seeds(planes[:, :, :width], fine[j].clusters)
            if halved > 0:
                places[:] = (places - 8) // 2
                for _ in range(halved):
                    _move(small_tiles, small_totals, half[j], colours, places)
                places[:] = 2 * places + 8
            for _ in range(iterations - 1):
                _move(tiles, totals, fine[j], colours, places)
            _assign(tiles, fine[j], colours, places, found)
            _connect(found, fine[j].clusters, runs, labels[i, j])


@_compiled
def _ceil(size: int, unit: int) -> int:
    return (size + unit - 1) // unit


@_compiled
def _buffers(height: int, width: int) -> tuple[Array, Array, Array]:
    """Return planes with rows of whole vectors, tiles, and the tiles' sums."""
    count = _ceil(height, HEIGHT) * _ceil(width, WIDTH)
    planes = np.zeros((3, height, _ceil(width, LANES) * LANES), np.int16)
    return planes, np.zeros((count, 2 * PIXELS), np.int32), np.empty((count, 6), np.int64)


@_compiled
def _address(rows: Array, index: int) -> int:
    return np.uintp(rows.ctypes.data) + np.uintp(index * rows.strides[0])


# colours


@_compiled
def _blurred_lab(
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
            start, out = _address(padded, channel), _address(across[channel], radius + y)
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
            start, out = _address(plane, radius + y), _address(planes[channel], y)
            for x in range(0, 2 * stride, 2 * LANES):
                _lanes.smooth(start + np.uintp(x), 2 * stride, weight, radius, out + np.uintp(x))


@_compiled
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


@_compiled
def _rounded(value: np.float32) -> np.int16:
    return np.int16(np.int32(value + np.float32(8192.5)) - np.int32(8192))


@_compiled
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


@_compiled
def _halve(planes: Array, height: int, width: int, small: Array) -> None:
    for channel in range(3):
        for y in range((height + 1) // 2):
            up, down = planes[channel, 2 * y], planes[channel, min(2 * y + 1, height - 1)]
            out = small[channel, y]
            for x in range(width // 2):
                total = np.int32(up[2 * x]) + up[2 * x + 1] + down[2 * x] + down[2 * x + 1]
                out[x] = (total + 2) >> 2
            if width % 2:
                out[width // 2] = (2 * (np.int32(up[width - 1]) + down[width - 1]) + 2) >> 2


@_compiled
def _tile(planes: Array, height: int, width: int, tiles: Array, totals: Array) -> None:
    """Cut planes into tiles (see `_lanes`); `totals` int64[t 6]: sums of L, a, b, 1, x, y."""
    across = _ceil(width, WIDTH)
    for y in range(height):
        rows = _address(planes[0], y), _address(planes[1], y), _address(planes[2], y)
        for column in range(across):
            step = np.uintp(2 * WIDTH * column)
            tile = _address(tiles, y // HEIGHT * across + column)
            tile += np.uintp(4 * WIDTH * (y % HEIGHT))
            _lanes.pack(rows[0] + step, rows[1] + step, rows[2] + step, tile)
    labels = np.zeros(PIXELS, np.int32)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        if top + HEIGHT > height or left + WIDTH > width:
            _blank(labels, height - top, width - left)
        totals[index] = 0
        _add(totals[index], _tally(_address(tiles, index), labels, 0, left, top), 1)
        labels[:] = 0


@_compiled
def _blank(labels: Array, rows: int, columns: int) -> None:
    """Label -1 what lies outside the image in a tile of which rows x columns are inside."""
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if y >= rows or x >= columns:
                labels[y * WIDTH + x] = -1


@_compiled
def _tally(tile: int, labels: Array, label: int, left: int, top: int) -> tuple[int, ...]:
    light, a, b, counts, x = _lanes.tally(tile, np.uintp(labels.ctypes.data), np.int32(label))
    count = np.int64(counts & 0xFFFF)
    x, y = x + left * count, (counts >> 16) + top * count
    return np.int64(light), np.int64(a), np.int64(b), count, np.int64(x), np.int64(y)


@_compiled
def _add(sums: Array, tally: tuple[int, ...], sign: int) -> None:
    for k in range(6):
        sums[k] += sign * tally[k]


# clusters


@_compiled
def _assign(tiles: Array, grid: Array, colours: Array, places: Array, found: Array) -> None:
    """Write all labels to `found` int32[h' 1 + w'], after its first column."""
    table, starts, candidates, number_bits = _candidates(grid, colours, places)
    across = _ceil(grid.width, WIDTH)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        out = _address(found, top) + np.uintp(4 * left + 4)
        _lanes.nearest(
            _address(tiles, index), _address(table, 0), _address(candidates, starts[index]),
            starts[index + 1] - starts[index], np.int32(16 * left), np.int32(16 * top),
            grid.weight, number_bits, out, found.strides[0],
        )  # fmt: skip


@_compiled
def _move(tiles: Array, totals: Array, grid: Array, colours: Array, places: Array) -> None:
    """Change colours and places to the means of the pixels assigned to them."""
    table, starts, candidates, number_bits = _candidates(grid, colours, places)
    across = _ceil(grid.width, WIDTH)
    sums = np.zeros((grid.clusters, 6), np.int64)
    labels = np.empty(PIXELS, np.int32)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        _lanes.nearest(
            _address(tiles, index), _address(table, 0), _address(candidates, starts[index]),
            starts[index + 1] - starts[index], np.int32(16 * left), np.int32(16 * top),
            grid.weight, number_bits, _address(labels, 0), 4 * WIDTH,
        )  # fmt: skip
        low = high = ~np.uint64(0)
        if top + HEIGHT > grid.height or left + WIDTH > grid.width:
            _blank(labels, grid.height - top, grid.width - left)
            outside = _lanes.equal(_address(labels, 0), np.int32(-1))
            low, high = ~outside[0], ~outside[1]
        _collect(_address(tiles, index), labels, low, high, totals[index], left, top, sums)
    for k in range(grid.clusters):
        count = sums[k, 3]
        if count > 0:
            for channel in range(3):
                colours[k, channel] = (4 * sums[k, channel] + count) // (2 * count)
            for axis in range(2):
                places[k, axis] = (32 * sums[k, 4 + axis] + count) // (2 * count)


@_compiled
def _collect(
    tile: int,
    labels: Array,
    low: int,
    high: int,
    total: Array,
    left: int,
    top: int,
    sums: Array,
) -> None:
    """Add the pixels of a tile, of the bits `low` and `high`, to the sums of their clusters.

    The first one gets the tile's total less what the others get: most tiles have one or two.
    """
    address, first = _address(labels, 0), labels[0]
    own = sums[first]
    for k in range(6):
        own[k] += total[k]
    same = _lanes.equal(address, first)
    low, high = low & ~same[0], high & ~same[1]
    while low | high != 0:
        place = _lanes.first_bit(low) if low != 0 else 64 + _lanes.first_bit(high)
        label = labels[place]
        same = _lanes.equal(address, label)
        low, high = low & ~same[0], high & ~same[1]
        part = _tally(tile, labels, label, left, top)
        _add(sums[label], part, 1)
        _add(own, part, -1)


@_compiled
def _table(grid: Array, colours: Array, places: Array) -> Array:
    """Return what `_lanes.nearest` needs of each cluster int32[k 8]."""
    table = np.empty((len(colours), 8), np.int32)
    for k in range(len(colours)):
        square = 0
        for channel in range(3):
            square += np.int64(colours[k, channel]) * np.int64(colours[k, channel])
        light, a, b = (
            (-2 * colours[k, 0]) >> grid.shift,
            (-2 * colours[k, 1]) >> grid.shift,
            (-2 * colours[k, 2]) >> grid.shift,
        )
        table[k, 0] = np.int32((light & 0xFFFF) | (a << 16))
        table[k, 1] = b & 0xFFFF
        table[k, 2] = square >> (1 + grid.shift)
        table[k, 3], table[k, 4] = places[k, 0], places[k, 1]
    return table


@_compiled
def _candidates(grid: Array, colours: Array, places: Array) -> tuple[Array, Array, Array, int]:
    """Return the table, where each tile's clusters start, their numbers, the bits of a number."""
    across, down = _ceil(grid.width, WIDTH), _ceil(grid.height, HEIGHT)
    clusters = grid.clusters
    change = np.zeros((down, across + 1), np.int32)
    spans = np.empty((clusters, min(down, grid.reach // (8 * HEIGHT) + 3), 2), np.int32)
    for k in range(clusters):
        x, y = places[k, 0], places[k, 1]
        top, bottom = _reached(y, grid.height, HEIGHT, grid.reach)
        for row in range(top, bottom):
            reach = _reach_in_row(y, row, grid.reach)
            left, right = _reached(x, grid.width, WIDTH, reach)
            spans[k, row - top, 0], spans[k, row - top, 1] = left, right
            change[row, left] += 1
            change[row, right] -= 1
    starts = np.empty(across * down + 1, np.int64)
    starts[0] = 0
    for row in range(down):
        count = 0
        for column in range(across):
            count += change[row, column]
            index = row * across + column
            starts[index + 1] = starts[index] + (count if count else clusters)
    numbers = np.empty(starts[-1], np.int32)
    ends = starts[:-1].copy()
    for k in range(clusters):
        top, bottom = _reached(places[k, 1], grid.height, HEIGHT, grid.reach)
        for row in range(top, bottom):
            left, right = spans[k, row - top, 0], spans[k, row - top, 1]
            for index in range(row * across + left, row * across + right):
                numbers[ends[index]] = k
                ends[index] += 1
    for index in range(len(ends)):
        if ends[index] == starts[index]:
            numbers[starts[index] : starts[index + 1]] = np.arange(clusters)
    number_bits = 0
    while number_bits < clusters - 1:
        number_bits = 2 * number_bits + 1
    return _table(grid, colours, places), starts, numbers, np.int32(number_bits)


# connected segments


@_compiled
def _connect(found: Array, asked: int, runs: Array, labels: Array) -> None:
    """Do what `reference.connect` does on runs of equal labels in a row, found as bits."""
    height, width = labels.shape
    start, parent, part = runs[0], runs[1], runs[2]
    firsts = np.zeros(height + 1, np.int64)
    edges = np.zeros((2, found.shape[1] // 64), np.uint64)
    count = 0
    for y in range(height):
        here, above = edges[y % 2], edges[1 - y % 2]
        row, step = _address(found, y) + np.uintp(4), np.uintp(found.strides[0])
        run_above = firsts[y - 1] - 1 if y > 0 else 0
        for word in range(len(here)):
            left = 64 * word
            at, run_here = row + np.uintp(4 * left), count - 1
            inside = ~np.uint64(0) >> np.uint64(max(0, left + 64 - width))
            here[word] = bits = _lanes.differ(at - np.uintp(4), at) & inside
            while bits != 0:
                start[count], parent[count] = left + _lanes.first_bit(bits), count
                bits &= bits - np.uint64(1)
                count += 1
            if y > 0:
                same = ~_lanes.differ(at, at - step) & inside
                # one pixel of each stretch in which both runs stay the same
                bits = same & (here[word] | above[word] | ~(same << np.uint64(1)))
                while bits != 0:
                    upto = bits ^ (bits - np.uint64(1))
                    i = run_above + _lanes.bit_count(above[word] & upto)
                    j = run_here + _lanes.bit_count(here[word] & upto)
                    _unite(parent, i, j)
                    bits &= bits - np.uint64(1)
                run_above += _lanes.bit_count(above[word])
        firsts[y + 1] = count
    _parts(start, parent, part, firsts, count, asked, labels)


@_compiled
def _unite(parent: Array, i: int, j: int) -> None:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    while parent[j] != j:
        parent[j] = parent[parent[j]]
        j = parent[j]
    parent[max(i, j)] = min(i, j)


@_compiled
def _parts(
    start: Array, parent: Array, part: Array, firsts: Array, count: int, asked: int, labels: Array
) -> None:
    height, width = labels.shape
    sizes, before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    parts = 0
    for y in range(height):
        for k in range(firsts[y], firsts[y + 1]):
            stop = start[k + 1] if k + 1 < firsts[y + 1] else width
            if parent[k] == k:
                part[k] = parts
                if start[k] > 0:
                    before[parts] = part[k - 1]
                elif y > 0:
                    before[parts] = part[firsts[y - 1]]
                parts += 1
            else:
                parent[k] = parent[parent[k]]
                part[k] = part[parent[k]]
            sizes[part[k]] += stop - start[k]
    final = np.empty(parts, np.int32)
    kept = _merge(sizes[:parts], before, height * width, asked, final)
    end = _address(labels, height)
    for y in range(height):
        row = _address(labels, y)
        for k in range(firsts[y], firsts[y + 1]):
            stop = start[k + 1] if k + 1 < firsts[y + 1] else width
            value = final[part[k]]
            # whole vectors: the next run writes over what is too much
            for x in range(start[k], stop, WIDTH):
                at = row + np.uintp(4 * x)
                if at + np.uintp(4 * WIDTH) <= end:
                    _lanes.fill(at, value)
                else:
                    labels[y, x:stop] = value
    _cut(labels, kept, asked)


@_compiled
def _merge(sizes: Array, before: Array, area: int, asked: int, final: Array) -> int:
    """Write to `final` int32[c] each component's segment; return the number of segments."""
    count = len(sizes)
    kept = np.empty(count, np.bool_)
    for k in range(count):
        kept[k] = k == 0 or 4 * asked * sizes[k] >= area
    joined = _resolve(kept, before, sizes, final)
    if 4 * asked * joined[0] < area:
        for k in range(1, count):
            if kept[k]:
                kept[k] = False
                break
    joined = _resolve(kept, before, sizes, final)
    number = kept.sum()
    excess = number - asked - max(1, asked // 20)
    for _ in range(excess):
        smallest = 0
        for k in range(1, count):
            if kept[k] and (smallest == 0 or joined[k] < joined[smallest]):
                smallest = k
        kept[smallest] = False
    number -= max(excess, 0)
    joined = _resolve(kept, before, sizes, final)
    rank = 0
    for k in range(count):
        if kept[k]:
            final[k] = rank
            rank += 1
        else:
            final[k] = final[before[k]]
    return rank


@_compiled
def _resolve(kept: Array, before: Array, sizes: Array, final: Array) -> Array:
    """Return the sizes of the kept components together with those that join them."""
    joined = np.zeros(len(kept), np.int64)
    for k in range(len(kept)):
        final[k] = k if kept[k] else final[before[k]]
        joined[final[k]] += sizes[k]
    return joined
