"""Operations on tiles of 8 x 16 pixels as LLVM vectors, which its vectoriser does not find alone.

A tile is int32[2 8 16]: L and a of a pixel as the 16-bit halves of one lane, then b; labels are
int32[8 16]. Tiles are given by address. Sixteen lanes are one register of AVX-512, two of AVX2,
four of NEON: the same code runs on all of them.
"""

from typing import Any

import numba.core.cgutils
import numba.extending
from llvmlite import ir
from numba import types

from dop_fast.kernels.slic.reference import FAR, TILE_HEIGHT, TILE_WIDTH

# Numba's own functions carry no types
intrinsic: Any = numba.extending.intrinsic
cgutils: Any = numba.core.cgutils
_tuple: Any = types.UniTuple

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_ROW = ir.VectorType(_I32, TILE_WIDTH)


@intrinsic
def nearest(
    typingctx: Any, tile: Any, table: Any, candidates: Any, count: Any, x: Any, y: Any,
    weight: Any, number_bits: Any, labels: Any, stride: Any,
) -> Any:  # fmt: skip
    """Write the labels of a tile: of each pixel, the nearest of `count` candidates (int32).

    The rows of `labels` are `stride` bytes apart.
    `table` int32[k 8] holds of each cluster: coefficients of (L, a) and of b, the constant term,
    x, y; `x`, `y` are the tile's own place in 1/16 pixel; for the rest see `reference.assign`.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, table, candidates, count, x, y, weight, number_bits, labels, stride = arguments
        dot = _Dot(context, builder)
        worst = ir.Constant(_ROW, [2**31 - 1] * TILE_WIDTH)
        best = [cgutils.alloca_once_value(builder, worst) for _ in range(TILE_HEIGHT)]
        rows = cgutils.alloca_once(builder, ir.ArrayType(_I32, TILE_HEIGHT))
        keep = _splat(builder, builder.not_(number_bits))
        colours = [_rows(builder, tile, TILE_HEIGHT * part) for part in (0, 1)]
        with cgutils.for_range(builder, count) as loop:
            index = builder.load(_at(builder, candidates, loop.index, _I32))
            record = builder.add(table, builder.mul(builder.sext(index, _I64), _I64(32)))
            light, other, base, cx, cy = (
                builder.load(_at(builder, record, _I64(field), _I32)) for field in range(5)
            )
            across = _spatial(builder, builder.sub(x, cx), weight, TILE_WIDTH)
            across = builder.add(across, _splat(builder, base))
            down = _spatial(builder, builder.sub(y, cy), weight, TILE_HEIGHT)
            builder.store(down, builder.bitcast(rows, down.type.as_pointer()), align=4)
            # a barrier: LLVM would shuffle the vector eight times instead of loading single lanes
            touch = ir.FunctionType(ir.VoidType(), [rows.type])
            builder.asm(touch, "", "r,~{memory}", [rows], True)
            light, other, number = (_splat(builder, v) for v in (light, other, index))
            for r in range(TILE_HEIGHT):
                term = builder.load(builder.gep(rows, [_I32(0), _I32(r)]))
                distance = builder.add(across, _splat(builder, term))
                distance = builder.add(distance, dot(colours[0][r], light))
                distance = builder.add(distance, dot(colours[1][r], other))
                packed = builder.or_(builder.and_(distance, keep), number)
                before = builder.load(best[r])
                less = builder.icmp_signed("<", packed, before)
                builder.store(builder.select(less, packed, before), best[r])
        for r in range(TILE_HEIGHT):
            found = builder.and_(builder.load(best[r]), builder.not_(keep))
            builder.store(found, builder.inttoptr(labels, _ROW.as_pointer()), align=4)
            labels = builder.add(labels, stride)
        return context.get_dummy_value()

    place = (types.int32, types.int32, types.float32, types.int32)
    addresses = (types.uintp,) * 3
    return types.void(*addresses, types.intp, *place, types.uintp, types.intp), emit


@intrinsic
def smooth(typingctx: Any, here: Any, step: Any, weights: Any, radius: Any, out: Any) -> Any:
    """Blur 32 int16 at `here`, of which the neighbours at distance k are k * `step` bytes away."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        here, step, weights, radius, out = arguments
        narrow, wide = ir.VectorType(_I16, 32), ir.VectorType(_I32, 32)

        def load(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, narrow.as_pointer()), align=2)

        def add(total: Any, k: Any) -> Any:
            away = builder.mul(builder.add(k, _I64(1)), step)
            both = builder.add(load(builder.sub(here, away)), load(builder.add(here, away)))
            place = builder.add(weights, builder.shl(k, _I64(1)))
            weight = builder.load(builder.inttoptr(place, _I16.as_pointer()))
            factors = (builder.sub(both, twice), _splat(builder, weight, 32))
            product = builder.mul(*(builder.sext(x, wide) for x in factors))
            high = builder.trunc(builder.ashr(product, ir.Constant(wide, [16] * 32)), narrow)
            return builder.add(total, high)

        centre = load(here)
        twice = builder.add(centre, centre)
        total = cgutils.alloca_once_value(builder, centre)
        usual = builder.icmp_signed("==", radius, _I64(4))
        with builder.if_else(usual, likely=True) as (then, otherwise):
            with then:  # sigma 1, without a loop
                result = centre
                for k in range(4):
                    result = add(result, _I64(k))
                builder.store(result, total)
            with otherwise, cgutils.for_range(builder, radius) as loop:
                builder.store(add(builder.load(total), loop.index), total)
        builder.store(builder.load(total), builder.inttoptr(out, narrow.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp, types.intp, types.uintp), emit


@intrinsic
def pack(typingctx: Any, lightness: Any, a: Any, b: Any, tile: Any) -> Any:
    """Write a tile's row: sixteen L, a and b from three addresses of int16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = ir.VectorType(_I16, TILE_WIDTH)
        *planes, tile = arguments
        lightness, a, b = (
            builder.load(builder.inttoptr(x, half.as_pointer()), align=2) for x in planes
        )
        high = builder.shl(builder.zext(a, _ROW), ir.Constant(_ROW, [16] * TILE_WIDTH))
        pair = builder.or_(builder.zext(lightness, _ROW), high)
        builder.store(pair, _at(builder, tile, _I64(0), _ROW), align=4)
        second = _at(builder, tile, _I64(TILE_HEIGHT * TILE_WIDTH), _ROW)
        builder.store(builder.sext(b, _ROW), second, align=4)
        return context.get_dummy_value()

    return types.void(*(types.uintp,) * 4), emit


@intrinsic
def equal(typingctx: Any, labels: Any, label: Any) -> Any:
    """Return a tile's pixels that have this label as bits: uint64 of rows 0-3, of rows 4-7."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        labels, label = arguments
        wanted = _splat(builder, label)
        same = [builder.icmp_signed("==", row, wanted) for row in _rows(builder, labels, 0)]
        halves = [_join(builder, same[:4]), _join(builder, same[4:])]
        return context.make_tuple(
            builder, signature.return_type, [builder.bitcast(half, _I64) for half in halves]
        )

    return _tuple(types.uint64, 2)(types.uintp, types.int32), emit


@intrinsic
def differ(typingctx: Any, one: Any, other: Any) -> Any:
    """Return as bits uint64 where 64 int32 at two addresses differ."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = (_rows(builder, address, 0, 4) for address in arguments)
        bits = [builder.icmp_signed("!=", *both) for both in zip(*rows, strict=True)]
        return builder.bitcast(_join(builder, bits), _I64)

    return types.uint64(types.uintp, types.uintp), emit


@intrinsic
def fill(typingctx: Any, address: Any, value: Any) -> Any:
    """Write sixteen times the same int32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        pointer = _at(builder, address, _I64(0), _ROW)
        builder.store(_splat(builder, value), pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.int32), emit


@intrinsic
def first_bit(typingctx: Any, bits: Any) -> Any:
    """Return the place of the lowest set bit of a uint64 that is not 0."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.intp(types.uint64), emit


@intrinsic
def bit_count(typingctx: Any, bits: Any) -> Any:
    """Return the number of set bits of a uint64."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.intp(types.uint64), emit


@intrinsic
def tally(typingctx: Any, tile: Any, labels: Any, label: Any) -> Any:
    """Return the sums of L, a, b, (1 + 65536 y) and x over a tile's pixels of this label."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, labels, label = arguments
        dot, wanted, zero = _Dot(context, builder), _splat(builder, label), ir.Constant(_ROW, None)
        first, second = (ir.Constant(_ROW, [v] * TILE_WIDTH) for v in (1, 1 << 16))
        sums = [zero] * 4
        light, other, found = (
            _rows(builder, tile, 0), _rows(builder, tile, TILE_HEIGHT), _rows(builder, labels, 0)
        )  # fmt: skip
        for r in range(TILE_HEIGHT):
            same = builder.icmp_signed("==", found[r], wanted)
            one = ir.Constant(_ROW, [1 + (r << 16)] * TILE_WIDTH)
            pair = builder.select(same, light[r], zero)
            terms = (
                dot(pair, first), dot(pair, second),
                builder.select(same, other[r], zero), builder.select(same, one, zero),
            )  # fmt: skip
            sums = [builder.add(*both) for both in zip(sums, terms, strict=True)]
        columns = dot(sums[3], ir.Constant(_ROW, list(range(TILE_WIDTH))))
        results = [*_totals(builder, sums), _totals(builder, [columns] * 4)[0]]
        return context.make_tuple(builder, signature.return_type, results)

    return _tuple(types.int32, 5)(types.uintp, types.uintp, types.int32), emit


class _Dot:
    """x0 y0 + x1 y1 of the signed 16-bit halves of each lane; PMADDWD where there is one."""

    def __init__(self, context: Any, builder: Any) -> None:
        features = context.codegen()._tm_features  # as set by NUMBA_CPU_FEATURES
        name, lanes = "", 0
        if "x86_64" in builder.module.triple:
            name, lanes = "sse2.pmadd.wd", 4
            if "+avx2" in features:
                name, lanes = "avx2.pmadd.wd", 8
            if "+avx512bw" in features:
                name, lanes = "avx512.pmaddw.d.512", 16
        self.builder, self.name, self.lanes = builder, f"llvm.x86.{name}", lanes

    def __call__(self, one: Any, other: Any) -> Any:
        builder = self.builder
        if not self.lanes:
            half = ir.Constant(_ROW, [16] * TILE_WIDTH)
            high = [builder.ashr(v, half) for v in (one, other)]
            low = [builder.ashr(builder.shl(v, half), half) for v in (one, other)]
            return builder.add(builder.mul(*low), builder.mul(*high))
        pairs = ir.VectorType(_I16, 2 * self.lanes)
        kind = ir.FunctionType(ir.VectorType(_I32, self.lanes), [pairs, pairs])
        function = cgutils.get_or_insert_function(builder.module, kind, self.name)
        parts = []
        for start in range(0, TILE_WIDTH, self.lanes):
            pick = _lanes(range(start, start + self.lanes))
            both = (builder.shuffle_vector(v, v, pick) for v in (one, other))
            parts.append(builder.call(function, [builder.bitcast(v, pairs) for v in both]))
        return _join(builder, parts)


def _lanes(order: Any) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(order)), list(order))


def _splat(builder: Any, value: Any, lanes: int = TILE_WIDTH) -> Any:
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(empty, value, _I32(0)), empty, _lanes([0] * lanes)
    )


def _join(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        order = _lanes(range(2 * parts[0].type.count))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.shuffle_vector(low, high, order) for low, high in pairs]
    return parts[0]


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    """Return the pointer to the int32 at `index` from `address`."""
    return builder.inttoptr(builder.add(address, builder.shl(index, _I64(2))), kind.as_pointer())


def _rows(builder: Any, address: Any, first: int, count: int = TILE_HEIGHT) -> list[Any]:
    """Load rows of sixteen lanes."""
    starts = (_I64(TILE_WIDTH * (first + r)) for r in range(count))
    return [builder.load(_at(builder, address, start, _ROW), align=4) for start in starts]


def _spatial(builder: Any, start: Any, weight: Any, lanes: int) -> Any:
    """Return min(weight d^2, FAR) of d = start, start + 16, ... (1/16 pixel)."""
    steps = _lanes(range(0, 16 * lanes, 16))
    floats = ir.VectorType(_F32, lanes)
    away = builder.sitofp(builder.add(_splat(builder, start, lanes), steps), floats)
    term = builder.fmul(_splat(builder, weight, lanes), builder.fmul(away, away))
    far = ir.Constant(floats, [float(FAR)] * lanes)
    term = builder.select(builder.fcmp_ordered("<", term, far), term, far)
    return builder.fptosi(term, ir.VectorType(_I32, lanes))


def _totals(builder: Any, vectors: list[Any]) -> list[Any]:
    """Return the sums over the lanes of four vectors, halving all of them together."""

    def fold(one: Any, other: Any, width: int) -> Any:
        # groups of `width` lanes -> half as wide, those of `one` before those of `other`
        both = range(2 * TILE_WIDTH)
        low = [k for k in both if k % width < width // 2]
        high = [k for k in both if k % width >= width // 2]
        halves = (builder.shuffle_vector(one, other, _lanes(order)) for order in (low, high))
        return builder.add(*halves)

    pairs = [fold(vectors[0], vectors[1], 16), fold(vectors[2], vectors[3], 16)]
    quads = fold(pairs[0], pairs[1], 8)
    quads = fold(quads, quads, 4)
    quads = fold(quads, quads, 2)
    return [builder.extract_element(quads, _I32(k)) for k in range(4)]
