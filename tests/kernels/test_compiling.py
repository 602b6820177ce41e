"""Every Triton kernel goes through the compiler, which needs no GPU; the interpreter is laxer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dop_fast.kernels.bits import gpu as bits
from dop_fast.kernels.compose import gpu as compose
from dop_fast.kernels.dualnorm import gpu as dualnorm
from dop_fast.kernels.masked_step import gpu as masked_step
from dop_fast.kernels.score import gpu as score
from dop_fast.kernels.select import gpu as select

def build(kernel, signature, **constants):
    names = kernel.arg_names
    kinds = dict(zip([n for n in names if n not in constants], signature.split(), strict=True))
    kinds |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: kinds[name] for name in names}, values)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})

build(select._first, "*i64 *i64 i32 *i32", ALIGNED=True, LOW=20, BLOCK=8192)
build(select._second, "*i64 *i64 i32 *i32", ALIGNED=True, LOW=20, BLOCK=4096)
build(select._equal, "*i64 *i64 *fp32 *i32", ALIGNED=False, BLOCK=4096)
build(select._mask, "*i64 *i64 i32 *fp32 *i64", ALIGNED=True, BYTES=512)
build(bits._apply, "*i64 *i64 i32", ALIGNED=True, BLOCK=4096)
for on in (True, False):
    build(score._score, "*i64 *i64 i32 fp32", FACTOR=on, MASK=on, ABSOLUTE=on, ADD=on,
          ALIGNED=on, BLOCK=4096)
    build(masked_step._step, "*i64 *i64 i32 *fp32 *fp32 fp32 fp32 fp32", NESTEROV=on, SCALED=on,
          ALIGNED=on, BLOCK=4096)
for out in ("*fp32", "*bf16"):
    build(compose._compose, "*u8 *i32 *i32 *i64 *u8 *i32 *i32 *fp32 " + out + " i32 i32 i32 i32",
          TAPS=8, POINT=22, BLOCK=256)

SCALARS = dict(rows="i32", channels="i32", chunk="i32", count="i32", eps="fp32")
SIZES = dict(ROWS=32, COLUMNS=64, RELU=True)
STORED = "y residual out g z kept p dy".split()
LONE = dict.fromkeys("p dy dmean slope b z residual kept".split())
for kernel in (dualnorm._moments, dualnorm._statistics, dualnorm._finish, dualnorm._forward,
               dualnorm._reduce, dualnorm._combine):
    for absent in ({}, LONE):
        fixed = {n: v for n, v in (SIZES | absent).items() if n in kernel.arg_names}
        kinds = [SCALARS.get(n, "*bf16" if n in STORED else "*fp32")
                 for n in kernel.arg_names if n not in fixed]
        build(kernel, " ".join(kinds), **fixed)
"""


def test_every_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
