"""SLIC compiled: `reference.py` step by step, on tiles that stay in registers and cache.

Batches are split over threads, not Numba's `prange`: compiling is faster, and it may be called
from several threads at once.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from dop_fast.kernels.slic import _lanes, reference
from dop_fast.kernels.slic._base import (
    HEIGHT,
    PIXELS,
    WIDTH,
    Address,
    Record,
    add,
    address,
    blank,
    ceil,
    compiled,
    tally_inside,
)
from dop_fast.kernels.slic._planes import blurred_lab, buffers, halve, tile_planes
from dop_fast.kernels.slic._segments import connect
from dop_fast.types import Array

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
_seeds = compiled(reference.seeds)
_reached = compiled(reference.tiles)
_reach_in_row = compiled(reference.reach_in_row)


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
    parts = min(torch.get_num_threads(), count)
    if parts <= 1:
        _span(images, *settings, labels)
        return labels
    edges = [count * k // parts for k in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        spans = [slice(*edge) for edge in pairwise(edges)]
        list(pool.map(lambda span: _span(images[span], *settings, labels[span]), spans))
    return labels


@compiled
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
    planes, tiles, totals = buffers(height, width)
    small, small_tiles, small_totals = buffers((height + 1) // 2, (width + 1) // 2)
    across = np.empty((3, height + 2 * len(weights), planes.shape[2]), np.int16)
    found = np.full((ceil(height, HEIGHT) * HEIGHT, 1 + ceil(width, 64) * 64), -1, np.int32)
    runs = np.empty((3, height * width), np.int32)
    for i in range(count):
        blurred_lab(images[i], tables, weights, columns, rows, across, planes)
        tile_planes(planes, height, width, tiles, totals)
        if halved > 0:
            halve(planes, height, width, small)
            tile_planes(small, (height + 1) // 2, (width + 1) // 2, small_tiles, small_totals)
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
            connect(found, fine[j].clusters, runs, labels[i, j])


@compiled
def _assign(tiles: Array, grid: Record, colours: Array, places: Array, found: Array) -> None:
    """Write all labels to `found` int32[h' 1 + w'], after its first column."""
    table, starts, candidates, number_bits = _candidates(grid, colours, places)
    across = ceil(grid.width, WIDTH)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        out = address(found, top) + np.uintp(4 * left + 4)
        _lanes.nearest(
            address(tiles, index), address(table, 0), address(candidates, starts[index]),
            starts[index + 1] - starts[index], np.int32(16 * left), np.int32(16 * top),
            grid.weight, number_bits, out, found.strides[0],
        )  # fmt: skip


@compiled
def _move(tiles: Array, totals: Array, grid: Record, colours: Array, places: Array) -> None:
    """Change colours and places to the means of the pixels assigned to them."""
    table, starts, candidates, number_bits = _candidates(grid, colours, places)
    across = ceil(grid.width, WIDTH)
    sums = np.zeros((grid.clusters, 6), np.int64)
    labels = np.empty(PIXELS, np.int32)
    for index in range(len(tiles)):
        top, left = index // across * HEIGHT, index % across * WIDTH
        _lanes.nearest(
            address(tiles, index), address(table, 0), address(candidates, starts[index]),
            starts[index + 1] - starts[index], np.int32(16 * left), np.int32(16 * top),
            grid.weight, number_bits, address(labels, 0), 4 * WIDTH,
        )  # fmt: skip
        low = high = ~np.uint64(0)
        if top + HEIGHT > grid.height or left + WIDTH > grid.width:
            blank(labels, grid.height - top, grid.width - left)
            outside = _lanes.equal(address(labels, 0), np.int32(-1))
            low, high = ~outside[0], ~outside[1]
        _collect(address(tiles, index), labels, low, high, totals[index], left, top, sums)
    for k in range(grid.clusters):
        count = sums[k, 3]
        if count > 0:
            for channel in range(3):
                colours[k, channel] = (4 * sums[k, channel] + count) // (2 * count)
            for axis in range(2):
                places[k, axis] = (32 * sums[k, 4 + axis] + count) // (2 * count)


@compiled
def _collect(
    tile: Address,
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
    place, first = address(labels, 0), labels[0]
    own = sums[first]
    for k in range(6):
        own[k] += total[k]
    same = _lanes.equal(place, first)
    low, high = low & ~same[0], high & ~same[1]
    while low | high != 0:
        pixel = _lanes.first_bit(low) if low != 0 else 64 + _lanes.first_bit(high)
        label = labels[pixel]
        same = _lanes.equal(place, label)
        low, high = low & ~same[0], high & ~same[1]
        part = tally_inside(tile, labels, label, left, top)
        add(sums[label], part, 1)
        add(own, part, -1)


@compiled
def _table(grid: Record, colours: Array, places: Array) -> Array:
    """Return what `_lanes.nearest` needs of each cluster int32[k 8]."""
    table = np.empty((len(colours), 8), np.int32)
    for k in range(len(colours)):
        square = np.int64(0)
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


@compiled
def _candidates(
    grid: Record, colours: Array, places: Array
) -> tuple[Array, Array, Array, np.int32]:
    """Return the table, where each tile's clusters start, their numbers, the bits of a number."""
    across, down = ceil(grid.width, WIDTH), ceil(grid.height, HEIGHT)
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
