"""What the compiled parts share: how they are compiled, sizes, addresses, one tile's sums."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numba import njit

from dop_fast.kernels.slic import _lanes, reference
from dop_fast.types import Array

HEIGHT, WIDTH = reference.TILE_HEIGHT, reference.TILE_WIDTH
PIXELS = HEIGHT * WIDTH
Address: TypeAlias = Any
"""Of memory, uintp: what `_lanes` takes instead of arrays."""
Record: TypeAlias = Any
"""A row of a structured array with the fields of `reference.Grid`."""
STAMP = sha256(
    b"".join(x.read_bytes() for x in sorted(Path(__file__).parent.glob("*.py")))
).digest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile, and cache until any file of this folder changes.

    Numba itself looks only at the function's own file, though the cached code contains what it
    calls in the others: an upgrade of those would go on running the old code.
    """
    dispatcher: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    dispatcher._cache._cache_file._source_stamp = STAMP
    return dispatcher


@compiled
def ceil(size: int, unit: int) -> int:
    return (size + unit - 1) // unit


@compiled
def address(rows: Array, index: int) -> Address:
    return np.uintp(rows.ctypes.data) + np.uintp(index * rows.strides[0])


@compiled
def blank(labels: Array, rows: int, columns: int) -> None:
    """Label -1 what lies outside the image in a tile of which rows x columns are inside."""
    for y in range(HEIGHT):
        for x in range(WIDTH):
            if y >= rows or x >= columns:
                labels[y * WIDTH + x] = -1


@compiled
def tally_inside(
    tile: Address, labels: Array, label: int, left: int, top: int
) -> tuple[np.int64, ...]:
    light, a, b, counts, x = _lanes.tally(tile, np.uintp(labels.ctypes.data), np.int32(label))
    count = np.int64(counts & 0xFFFF)
    x, y = x + left * count, (counts >> 16) + top * count
    return np.int64(light), np.int64(a), np.int64(b), count, np.int64(x), np.int64(y)


@compiled
def add(sums: Array, tally: tuple[np.int64, ...], sign: int) -> None:
    for k in range(6):
        sums[k] += sign * tally[k]
