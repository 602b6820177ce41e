"""Loads and stores at addresses of bytes, and LLVM vectors, which its vectoriser does not find.

Sixty-four bytes are one register of AVX-512, two of AVX2, four of NEON: the same code runs on all
of them.
"""

from typing import Any

import numba.extending
from llvmlite import ir
from numba import types

# Numba's own functions carry no types
intrinsic: Any = numba.extending.intrinsic

LANES = 64
PIXELS = LANES // 3
_I64 = ir.IntType(64)
_BYTES, _BITS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(1), LANES)


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """Return the uint64 at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()), align=1)

    return types.uint64(types.uintp), emit


@intrinsic
def store(typingctx: Any, address: Any, word: Any) -> Any:
    """Write a uint64 at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, word = arguments
        builder.store(word, builder.inttoptr(address, _I64.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), emit


@intrinsic
def spread(typingctx: Any, target: Any, word: Any) -> Any:
    """Write each bit of a word, the lowest first, as one of 64 bytes at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, word = arguments
        into = builder.inttoptr(target, _BYTES.as_pointer())
        builder.store(builder.zext(builder.bitcast(word, _BITS), _BYTES), into, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), emit


@intrinsic
def overlay(typingctx: Any, target: Any, source: Any, word: Any) -> Any:
    """Copy those of 21 pixels of three bytes between addresses whose bit is set, lowest first."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, word = arguments
        bits = builder.bitcast(
            builder.trunc(word, ir.IntType(32)), ir.VectorType(ir.IntType(1), 32)
        )
        chosen = builder.sext(bits, ir.VectorType(ir.IntType(8), 32))
        pixel = [lane // 3 for lane in range(3 * PIXELS)]
        none = ir.Constant(chosen.type, [0] * 32)  # the last lane is of no pixel
        wanted = builder.shuffle_vector(
            chosen, none, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [*pixel, 32])
        )
        wanted = builder.icmp_signed("<", wanted, ir.Constant(_BYTES, [0] * LANES))
        into, out_of = (builder.inttoptr(x, _BYTES.as_pointer()) for x in (target, source))
        new, old = builder.load(out_of, align=1), builder.load(into, align=1)
        builder.store(builder.select(wanted, new, old), into, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uint64), emit
