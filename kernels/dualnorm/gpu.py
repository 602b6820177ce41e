"""Dual batch norm in Triton: `reference.py` in as few sweeps over memory as the mathematics needs.

The split into `_reduce` and `_combine` is that of `cpu.py`. A reduction leaves one row of sums for
each program; `_finish` adds them in order, so results are the same bit for bit in each run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dop_fast.kernels.dualnorm.reference import Norm

TILE = 2048  # elements of each operand that a program holds: more would leave fewer programs room
COLUMNS = 64  # at most: 128 bytes of bfloat16
PROGRAMS = 1024  # of a reduction, at most: eight for each multiprocessor of a large GPU
FEW = 16  # columns of a program that adds up partial sums: narrow, so that there are more of them


def moments(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `reference.moments` does."""
    (rows, channels), tile = y.shape, _tile(y)
    grid, chunk = _grid(y)
    parts = y.new_empty((2, grid[1], channels), dtype=torch.float32)
    mean, rstd = y.new_empty((2, channels), dtype=torch.float32)
    _moments[grid](y, parts, rows, channels, chunk, *tile)
    _statistics[(triton.cdiv(channels, FEW),)](
        parts, mean, rstd, rows, channels, chunk, grid[1], eps, 128, FEW
    )
    return mean, rstd


def forward(
    norm: Norm, y: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, out: Tensor
) -> Tensor:
    """Fill `out` with what `reference.forward` returns."""
    vectors = (norm.mean, norm.rstd, norm.weight, bias)
    _forward[_cover(y)](y, residual, out, *vectors, *y.shape, relu, *_tile(y))
    return out


def tangent(
    norm: Norm, y: Tensor, dy: Tensor, z: Tensor | None, dresidual: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `out` with dz; return what `reference.tangent` does."""
    dmean, slope = means = _means(norm, dy, y, None, None)
    _sweep(norm, means, (dy, y, z, dresidual, out))
    return out, dmean, slope


def adjoint(
    norm: Norm, g: Tensor, y: Tensor, z: Tensor | None, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `out` with gy and, if there is z, ga; return what `reference.adjoint` does."""
    gy, ga = out
    means = _means(norm, g, y, z, ga)
    _sweep(norm, means, (ga, y, None, None, gy))
    return gy, ga, means[1]


def tangent_adjoint(
    norm: Norm,
    dg: Tensor,
    primal: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill `out` with the tangents of gy and, if there is z, of ga; return both."""
    (y, gy, z), (dgy, dga) = primal, out
    pair = (gy, dy, *sums)
    means = _means(norm, dg, y, z, dga, pair)
    _sweep(norm, means, (dga, y, None, None, dgy), pair)
    return dgy, dga


NO_PAIR = (None,) * 5


def _means(
    norm: Norm, g: Tensor, y: Tensor, z: Tensor | None, kept: Tensor | None, pair: Any = NO_PAIR
) -> Tensor:
    """Return the means of g, of xhat g and, with a pair (gy, dy, ...), of gy dxhat."""
    (rows, channels), kinds = y.shape, 2 if pair[0] is None else 3
    grid, chunk = _grid(y)
    parts = y.new_empty((kinds, grid[1], channels), dtype=torch.float32)
    means = y.new_empty((kinds, channels), dtype=torch.float32)
    vectors = (norm.mean, norm.rstd, *pair[2:4])
    _reduce[grid](
        g, y, z, kept, *pair[:2], parts, *vectors, rows, channels, chunk, *_tile(y)
    )  # fmt: skip
    _finish[(triton.cdiv(channels, FEW), kinds)](
        parts, means, norm.rstd, rows, channels, grid[1], 128, FEW
    )
    return means


def _sweep(norm: Norm, means: Tensor, arrays: Any, pair: Any = NO_PAIR) -> None:
    """Combine `arrays`: g, y, z, residual, out."""
    y = arrays[1]
    vectors = (norm.mean, norm.rstd, norm.weight, means, *pair[2:], norm.eps)
    _combine[_cover(y)](*arrays, *pair[:2], *vectors, *y.shape, *_tile(y))


def _tile(y: Tensor) -> tuple[int, int]:
    """Return rows and columns of a tile."""
    columns = min(COLUMNS, triton.next_power_of_2(y.shape[1]))
    return min(TILE // columns, triton.next_power_of_2(len(y))), columns


def _cover(y: Tensor) -> tuple[int]:
    """Return how many tiles there are; in one dimension, as the second is limited to 65,535."""
    rows, columns = _tile(y)
    return (triton.cdiv(len(y), rows) * triton.cdiv(y.shape[1], columns),)


def _grid(y: Tensor) -> tuple[tuple[int, int], int]:
    """Return the programs of a reduction, across and down, and how many rows each adds up."""
    rows, columns = _tile(y)
    across = triton.cdiv(y.shape[1], columns)
    tiles = triton.cdiv(len(y), rows)
    chunk = rows * triton.cdiv(tiles, max(1, PROGRAMS // across))
    return (across, triton.cdiv(len(y), chunk)), chunk


@triton.jit
def _positive(z, at, inside):  # type: ignore[no-untyped-def]
    return (tl.load(z + at, mask=inside, other=0).to(tl.float32) > 0).to(tl.float32)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    y, parts, rows, channels, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write mean and sum of squares about it: Welford's in each place of the tile, then Chan's."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, rows)
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(first, last, ROWS):
        row = top + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < channels)[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(y + at, mask=inside, other=0).to(tl.float32)
        away = tl.where(inside, value - mean, 0.0)
        mean += away / ((top - first) // ROWS + 1)
        square += away * tl.where(inside, value - mean, 0.0)
    each = (last - first - tl.arange(0, ROWS) + ROWS - 1) // ROWS
    weight = tl.maximum(each, 0).to(tl.float32)[:, None]
    centre = tl.sum(mean * weight, 0) / (last - first)
    away = mean - centre[None, :]
    total = tl.sum(square + weight * away * away, 0)
    at = tl.program_id(1) * channels + column
    tl.store(parts + at, centre, mask=column < channels)
    tl.store(parts + tl.num_programs(1) * channels + at, total, mask=column < channels)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    parts, mean, rstd, rows, channels, chunk, count, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Combine what `_moments` left."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(0, count, ROWS):
        part = top + tl.arange(0, ROWS)
        inside = (part < count)[:, None] & (column < channels)[None, :]
        weight = tl.minimum(rows - part * chunk, chunk).to(tl.float32)[:, None]
        at = part[:, None] * channels + column[None, :]
        total += weight * tl.load(parts + at, mask=inside, other=0)
    centre = tl.sum(total, 0) / rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(0, count, ROWS):
        part = top + tl.arange(0, ROWS)
        inside = (part < count)[:, None] & (column < channels)[None, :]
        weight = tl.minimum(rows - part * chunk, chunk).to(tl.float32)[:, None]
        at = part[:, None] * channels + column[None, :]
        away = tl.load(parts + at, mask=inside, other=0) - centre[None, :]
        total += tl.where(inside, weight * away * away, 0.0)
        total += tl.load(parts + count * channels + at, mask=inside, other=0)
    tl.store(mean + column, centre, mask=column < channels)
    scale = 1 / tl.sqrt(tl.sum(total, 0) / rows + eps)
    tl.store(rstd + column, scale, mask=column < channels)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    y, residual, out, mean, rstd, weight, bias,
    rows, channels, RELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, COLUMNS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    real = column < channels
    inside = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    scale = tl.load(weight + column, mask=real) * tl.load(rstd + column, mask=real)
    centre = tl.load(mean + column, mask=real)
    value = tl.load(y + at, mask=inside).to(tl.float32) - centre[None, :]
    value = value * scale[None, :] + tl.load(bias + column, mask=real)[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # tl.maximum would lose NaN
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _reduce(  # type: ignore[no-untyped-def]
    g, y, z, kept, p, dy, parts, mean, rstd,
    dmean, slope, rows, channels, chunk,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up as `cpu._reduce` does."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < channels
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, rows)
    centre = tl.load(mean + column, mask=real, other=0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    along = tl.zeros((ROWS, COLUMNS), tl.float32)
    if p is not None:
        other = tl.zeros((ROWS, COLUMNS), tl.float32)
        middle = tl.load(dmean + column, mask=real, other=0)[None, :]
        turn = tl.load(rstd + column, mask=real, other=0)
        turn = (turn * tl.load(slope + column, mask=real, other=0))[None, :]
    for top in range(first, last, ROWS):
        row = top + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        at = row.to(tl.int64)[:, None] * channels + column[None, :]
        value = tl.load(g + at, mask=inside, other=0).to(tl.float32)
        d = tl.load(y + at, mask=inside, other=0).to(tl.float32) - centre
        if z is not None:
            value *= _positive(z, at, inside)
            tl.store(kept + at, value.to(kept.dtype.element_ty), mask=inside)
        total += value
        along += value * tl.where(inside, d, 0.0)
        if p is not None:
            u = tl.load(dy + at, mask=inside, other=0).to(tl.float32) - middle - d * turn
            u *= tl.load(p + at, mask=inside, other=0).to(tl.float32)
            other += tl.where(inside, u, 0.0)
    at = parts + tl.program_id(1) * channels + column
    stride = tl.num_programs(1) * channels
    tl.store(at, tl.sum(total, 0), mask=real)
    tl.store(at + stride, tl.sum(along, 0), mask=real)
    if p is not None:
        tl.store(at + 2 * stride, tl.sum(other, 0), mask=real)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    parts, means, rstd, rows, channels, count,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn sums into means, all but the first times rstd: they contain xhat or its tangent."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kind = tl.program_id(1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for top in range(0, count, ROWS):
        part = top + tl.arange(0, ROWS)
        inside = (part < count)[:, None] & (column < channels)[None, :]
        at = (kind * count + part)[:, None] * channels + column[None, :]
        total += tl.load(parts + at, mask=inside, other=0)
    mean = tl.sum(total, 0) / rows
    if kind > 0:
        mean *= tl.load(rstd + column, mask=column < channels)
    tl.store(means + kind * channels + column, mean, mask=column < channels)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    g, y, z, residual, out, p, dy, mean, rstd,
    weight, means, dmean, slope, b, eps, rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Combine as `cpu._combine` does, the last rows first: those are in the cache still."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(channels, COLUMNS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tile // across * ROWS + tl.arange(0, ROWS)
    real = column < channels
    inside = (row < rows)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    inverse = tl.load(rstd + column, mask=real)
    scale = tl.load(weight + column, mask=real) * inverse
    steep = tl.load(means + channels + column, mask=real)  # the mean of xhat g
    if p is None:
        steep *= scale * inverse
    else:
        along = tl.load(slope + column, mask=real)
        across_b = tl.load(b + column, mask=real)
        cross = eps * inverse * inverse * inverse * along
        db = scale * (steep + across_b * cross)
        db += tl.load(means + 2 * channels + column, mask=real)
        turn = inverse * along
        across_b *= scale * inverse
        steep = inverse * db - across_b * turn
    value = tl.load(g + at, mask=inside).to(tl.float32)
    value = (value - tl.load(means + column, mask=real)[None, :]) * scale[None, :]
    d = tl.load(y + at, mask=inside).to(tl.float32) - tl.load(mean + column, mask=real)[None, :]
    value -= d * steep[None, :]
    if p is not None:
        u = tl.load(dy + at, mask=inside).to(tl.float32)
        u -= tl.load(dmean + column, mask=real)[None, :]
        value -= u * across_b[None, :]
        value -= turn[None, :] * tl.load(p + at, mask=inside).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + at, mask=inside).to(tl.float32)
    if z is not None:
        value *= _positive(z, at, inside)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)
