"""Dual batch norm in Numba: `reference.py` in as few sweeps over memory as the mathematics needs.

`tangent`, `adjoint` and `tangent_adjoint` are each one reduction and one linear combination (see
`_reduce` and `_combine`), whose coefficients depend on the channel only. Rows are summed in
float32 over blocks, these in float64 over spans, which are added in order: the number of threads
does not change a bit of the result.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from torch import Tensor

from dop_fast.kernels.dualnorm.reference import Norm
from dop_fast.types import Array

# contract: a product and a sum are one instruction; NaN and signs stay what they are
_compiled: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_intrinsic: Any = numba.extending.intrinsic(prefer_literal=True)

BLOCK, TILE = 32, 512  # rows and channels: what belongs to a channel stays in the first cache
SPAN = 1 << 17  # elements: what a thread takes at a time
_I32 = ir.IntType(32)
ROLES = ("input", "output", "first", "second", "third")


@np.errstate(invalid="ignore")  # infinities
def moments(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `reference.moments` does."""
    totals = _totals(y, 2)
    _sweep(y, _moments, _flat(y), totals)
    first, second = _means(y, totals)
    variance = np.maximum(second - first * first, 0)
    return _single(first + y[0].double().numpy()), _single(1 / np.sqrt(variance + eps))


def forward(
    norm: Norm, y: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, out: Tensor
) -> Tensor:
    """Fill `out` with what `reference.forward` returns."""
    floor = np.float32(0 if relu else -np.inf)
    channel = _stack(norm.mean, norm.scale, bias)
    _sweep(y, _forward, _flat(y), _flat(residual), _flat(out), channel, floor)
    return out


def tangent(
    norm: Norm, y: Tensor, dy: Tensor, z: Tensor | None, dresidual: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `out` with dz; return what `reference.tangent` does."""
    dmean, slope, _ = _reduced(norm, dy, y, (None, None), None, _stack(norm.mean))
    channel = _stack(norm.mean, dmean, norm.scale, norm.scale * norm.rstd * slope)
    _sweep(y, _combine, _flat(dy), _flat(y), None, _flat(dresidual), _flat(z), _flat(out), channel)
    return out, dmean, slope


def adjoint(
    norm: Norm, g: Tensor, y: Tensor, z: Tensor | None, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `out` with gy and, if there is z, ga; return what `reference.adjoint` does."""
    gy, ga = out
    mean, b, _ = _reduced(norm, g, y, (z, ga), None, _stack(norm.mean))
    channel = _stack(norm.mean, mean, norm.scale, norm.scale * norm.rstd * b)
    _sweep(y, _combine, _flat(ga), _flat(y), None, None, None, _flat(gy), channel)
    return gy, ga, b


def tangent_adjoint(
    norm: Norm,
    dg: Tensor,
    primal: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Fill `out` with the tangents of gy and, if there is z, of ga; return both."""
    (y, gy, z), (dmean, slope, b), (dgy, dga) = primal, sums, out
    turn = norm.rstd * slope
    pair = (_flat(gy), _flat(dy))
    channel = _stack(norm.mean, dmean, turn)
    mean, along, other = _reduced(norm, dg, y, (z, dga), pair, channel)
    db = norm.scale * (along + b * norm.eps * norm.rstd**3 * slope) + other
    across = norm.scale * norm.rstd * b
    steep = norm.rstd * db - across * turn
    channel = _stack(norm.mean, mean, norm.scale, steep, dmean, turn, across)
    _sweep(y, _combine, _flat(dga), _flat(y), pair, None, None, _flat(dgy), channel)
    return dgy, dga


def _totals(y: Tensor, kinds: int) -> Array:
    """Return memory for sums: float64[spans kinds channels] in one row."""
    return np.zeros(_spans(y) * kinds * y.shape[1])


@np.errstate(invalid="ignore")
def _means(y: Tensor, totals: Array) -> Array:
    """Return means float64[kinds channels]."""
    sums: Array = totals.reshape(_spans(y), -1, y.shape[1]).sum(0)
    return sums / len(y)


def _reduced(
    norm: Norm, g: Tensor, y: Tensor, mask: tuple[Tensor | None, Tensor | None], pair: Any,
    channel: Array,
) -> Tensor:  # fmt: skip
    """Return the means that `_reduce` prepares, those that contain xhat or dxhat with rstd."""
    totals = _totals(y, 3)
    z, kept = map(_flat, mask)
    _sweep(y, _reduce, _flat(g), _flat(y), z, kept, pair, channel, totals)
    means = torch.from_numpy(_means(y, totals))
    means[1:] *= norm.rstd
    return means.float()


def _flat(values: Tensor | None) -> Array | None:
    """Return the memory of a contiguous tensor, of bfloat16 the bits, as one row."""
    if values is None:
        return None
    bits = values if values.dtype == torch.float32 else values.view(torch.uint16)
    return bits.detach().reshape(-1).numpy()


def _stack(*channels: Tensor) -> Array:
    return torch.cat(channels).detach().numpy()


def _single(values: Array) -> Tensor:
    return torch.from_numpy(values).float()


def _span(channels: int) -> int:
    """Return how many rows a span has: whole blocks."""
    return max(1, SPAN // (channels * BLOCK)) * BLOCK


def _spans(y: Tensor) -> int:
    return -(-len(y) // _span(y.shape[1]))


def _sweep(y: Tensor, kernel: Any, *arguments: Any) -> None:
    """Run a kernel over all spans on torch's number of threads."""
    spans, threads = _spans(y), torch.get_num_threads()
    sizes = (_span(y.shape[1]), *y.shape)
    parts = min(threads, spans)
    if parts == 1:
        kernel((0, spans), sizes, *arguments)
        return
    edges = pairwise(spans * k // parts for k in range(parts + 1))
    list(_pool(os.getpid(), threads).map(lambda edge: kernel(edge, sizes, *arguments), edges))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads that wait for work; those of another process are lost in a fork."""
    return ThreadPoolExecutor(threads)


@_intrinsic
def _get(typingctx: Any, array: Any, at: Any, role: Any) -> Any:
    """Read from a contiguous array; uint16 are the bits of a bfloat16, which become float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        value = builder.load(builder.gep(data, [arguments[1]]))
        _apart(builder.module, value, role.literal_value)
        if array.dtype != types.uint16:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), ir.FloatType())

    kind = types.float32 if array.dtype == types.uint16 else array.dtype
    return kind(array, types.intp, role), emit


@_intrinsic
def _put(typingctx: Any, array: Any, at: Any, value: Any, role: Any) -> Any:
    """Write to a contiguous array; into uint16, the bits of the nearest bfloat16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        value = arguments[2]
        if array.dtype == types.uint16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
            bits = builder.add(bits, builder.add(odd, _I32(0x7FFF)))
            nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(nan, _I32(0x7FC00000), bits)
            value = builder.trunc(builder.lshr(bits, _I32(16)), ir.IntType(16))
        store = builder.store(value, builder.gep(data, [arguments[1]]))
        _apart(builder.module, store, role.literal_value)
        return context.get_dummy_value()

    kind = types.float32 if array.dtype == types.uint16 else array.dtype
    return types.void(array, types.intp, kind, role), emit


def _apart(module: Any, access: Any, role: str) -> None:
    """Promise LLVM that arrays of different roles do not overlap, but for equal places.

    Without it, the loops over channels have too many pairs of arrays to check, and stay scalar.
    """
    domain = module.add_metadata(["dop_fast.kernels.dualnorm"])
    scopes = {name: module.add_metadata([name, domain]) for name in ROLES}
    access.set_metadata("alias.scope", module.add_metadata([scopes.pop(role)]))
    access.set_metadata("noalias", module.add_metadata(list(scopes.values())))


@_compiled
def _moments(edge: tuple[int, int], sizes: tuple[int, int, int], y: Array, totals: Array) -> None:
    """Add up the first two moments about the first row.

    A block's are taken about the block's first row: one of the values, so what cancels is at most
    BLOCK times what is left.
    """
    span, rows, channels = sizes
    sums = _scratch()
    for part in range(*edge):
        end = min(rows, (part + 1) * span)
        for top in range(part * span, end, BLOCK):
            bottom = min(end, top + BLOCK)
            for left in range(0, channels, TILE):
                width, shift = min(TILE, channels - left), top * channels + left
                sums[:] = 0
                for row in range(top, bottom):
                    at = row * channels + left
                    for c in range(width):
                        d = _get(y, at + c, "input") - _get(y, shift + c, "input")
                        _add(sums, c, d, "first")
                        _add(sums, TILE + c, d * d, "second")
                n, into = np.float64(bottom - top), 2 * part * channels + left
                for c in range(width):
                    away = np.float64(_get(y, shift + c, "input"))
                    away = away - np.float64(_get(y, left + c, "input"))
                    first = np.float64(_get(sums, c, "first"))
                    second = np.float64(_get(sums, TILE + c, "second"))
                    _add(totals, into + c, first + n * away, "third")
                    second = second + away * (first + first + n * away)
                    _add(totals, into + channels + c, second, "output")


@_compiled
def _forward(
    edge: tuple[int, int], sizes: tuple[int, int, int], y: Array, residual: Array | None,
    out: Array, channel: Array, floor: Any,
) -> None:  # fmt: skip
    """`channel`: mean, scale, bias."""
    span, rows, channels = sizes
    for row in range(edge[0] * span, min(rows, edge[1] * span)):
        at = row * channels
        for c in range(channels):
            value = _get(y, at + c, "input") - _get(channel, c, "input")
            value = value * _get(channel, channels + c, "input")
            value = value + _get(channel, 2 * channels + c, "input")
            if residual is not None:
                value = value + _get(residual, at + c, "input")
            _put(out, at + c, floor if value < floor else value, "output")


@_compiled
def _reduce(
    edge: tuple[int, int], sizes: tuple[int, int, int], g: Array, y: Array, z: Array | None,
    kept: Array | None, pair: tuple[Array, Array] | None, channel: Array, totals: Array,
) -> None:  # fmt: skip
    """Add up g and (y - mean) g, where z > 0, and write that g to `kept`.

    With a pair (p, dy), also p u; u = (y - mean)' without its part along rstd', which is
    dy - dmean - (y - mean) turn. `channel`: mean, dmean, turn.
    """
    span, rows, channels = sizes
    sums = _scratch()
    for part in range(*edge):
        end = min(rows, (part + 1) * span)
        for top in range(part * span, end, BLOCK):
            for left in range(0, channels, TILE):
                width = min(TILE, channels - left)
                sums[:] = 0
                for row in range(top, min(end, top + BLOCK)):
                    at = row * channels + left
                    for c in range(width):
                        value = _get(g, at + c, "input")
                        if z is not None:
                            value = value * _positive(z, at + c)
                            _put(kept, at + c, value, "output")
                        d = _get(y, at + c, "input") - _get(channel, left + c, "input")
                        _add(sums, c, value, "first")
                        _add(sums, TILE + c, d * value, "second")
                        if pair is not None:
                            u = _get(pair[1], at + c, "input")
                            u = u - _get(channel, channels + left + c, "input")
                            u = u - d * _get(channel, 2 * channels + left + c, "input")
                            _add(sums, 2 * TILE + c, u * _get(pair[0], at + c, "input"), "third")
                for k in range(3):
                    into = (3 * part + k) * channels + left
                    for c in range(width):
                        _add(
                            totals, into + c, np.float64(_get(sums, k * TILE + c, "first")), "third"
                        )


@_compiled
def _combine(
    edge: tuple[int, int], sizes: tuple[int, int, int], g: Array, y: Array,
    pair: tuple[Array, Array] | None, residual: Array | None, z: Array | None, out: Array,
    channel: Array,
) -> None:  # fmt: skip
    """Write scale (g - gmean) - steep (y - mean) - turn p - across (dy - dmean) + residual.

    Where there is z, only where z > 0. `channel`: mean, gmean, scale, steep and, with a pair
    (p, dy), dmean, turn, across. From the last span back: that is in the cache still.
    """
    span, rows, channels = sizes
    for part in range(edge[1] - 1, edge[0] - 1, -1):
        for row in range(part * span, min(rows, (part + 1) * span)):
            at = row * channels
            for k in range(channels):
                d = _get(y, at + k, "input") - _get(channel, k, "input")
                value = _get(g, at + k, "input") - _get(channel, channels + k, "input")
                value = value * _get(channel, 2 * channels + k, "input")
                value = value - d * _get(channel, 3 * channels + k, "input")
                if pair is not None:
                    u = _get(pair[1], at + k, "input") - _get(channel, 4 * channels + k, "input")
                    turn = _get(channel, 5 * channels + k, "input")
                    value = value - turn * _get(pair[0], at + k, "input")
                    value = value - u * _get(channel, 6 * channels + k, "input")
                if residual is not None:
                    value = value + _get(residual, at + k, "input")
                if z is not None:
                    value = value * _positive(z, at + k)
                _put(out, at + k, value, "output")


@_compiled
def _positive(z: Array, at: int) -> Any:
    return np.float32(1) if _get(z, at, "input") > np.float32(0) else np.float32(0)


@_compiled
def _scratch() -> Array:
    """Return three tiles of sums that start a cache line: vectors across two are slow."""
    values = np.empty(3 * TILE + 16, np.float32)
    start = (64 - np.intp(values.ctypes.data) % 64) // 4
    return values[start : start + 3 * TILE]


@_compiled
def _add(sums: Array, at: int, value: Any, role: Any) -> None:
    _put(sums, at, _get(sums, at, role) + value, role)
