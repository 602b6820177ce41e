"""Dual batch norm against the same mathematics in eager PyTorch, and against a plain copy.

Of each function: its time, and the bytes that it must move a second against those of a copy (read
and write). Ours writes to given memory, as an engine would; what eager PyTorch takes is its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _timing import Row, alternate, arguments, faster, report
from torch import Tensor

from dop_fast.kernels import dualnorm
from dop_fast.kernels.dualnorm import Norm, reference

SHAPES = {"cpu": ((8 * 56 * 56, 256), (8 * 7 * 7, 2048))}
SHAPES["cuda"] = tuple((16 * rows, channels) for rows, channels in SHAPES["cpu"])
EAGER_GOAL = 3.0
COPY_GOAL = {"cpu": None, "cuda": 0.85}
MOVED = {"moments": 1, "forward": 3, "tangent": 7, "adjoint": 7, "tangent_adjoint": 11}
"""Elements read and written for each of y, with ReLU and residual: sums first, then the rest."""
Job = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One layer: its arrays, and memory for results."""

    norm: Norm
    bias: Tensor
    arrays: tuple[Tensor, ...]
    out: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor, Tensor]


def case(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    y, residual, dy, dresidual, g, dg, gy = (draw(shape).to(dtype) for _ in range(7))
    weight, bias = draw((2, shape[1]))
    norm = Norm(*reference.moments(y, 1e-5), weight, 1e-5)
    z = reference.forward(norm, y, bias, residual, True)
    sums = (*reference.tangent(norm, y, dy, z, None)[1:], reference.adjoint(norm, g, y, z)[2])
    out = (torch.empty_like(y), torch.empty_like(y))
    return Case(norm, bias, (y, residual, z, dy, dresidual, g, dg, gy), out, sums)


def jobs(case: Case, module: Any, wrap: Callable[[Any], Any] = lambda f: f) -> dict[str, Job]:
    """Return each function of `module` on the case; ours with memory for its results."""
    norm, out = case.norm, case.out
    y, residual, z, dy, dresidual, g, dg, gy = case.arrays
    given: dict[str, tuple[Any, ...]] = {
        "moments": (y, norm.eps),
        "forward": (norm, y, case.bias, residual, True),
        "tangent": (norm, y, dy, z, dresidual),
        "adjoint": (norm, g, y, z),
        "tangent_adjoint": (norm, dg, (y, gy, z), dy, case.sums),
    }
    memory: dict[str, Any] = {
        "forward": out[0], "tangent": out[0], "adjoint": out, "tangent_adjoint": out
    }  # fmt: skip
    result: dict[str, Job] = {}
    for name, values in given.items():
        call = wrap(getattr(module, name))
        if module is dualnorm and name in memory:
            call = partial(call, out=memory[name])
        result[name] = partial(call, *values)
    return result


def rows_of(shape: tuple[int, int], dtype: torch.dtype, device: str, options: Any) -> list[Row]:
    one, found = case(shape, dtype, device), []
    kind = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    with torch.no_grad():
        peers = {"eager": jobs(one, reference)}
        if options.compile:
            peers["compiled"] = jobs(one, reference, partial(torch.compile, dynamic=False))
        ours = jobs(one, dualnorm)
        work: dict[str, Job] = {"copy": partial(one.out[0].copy_, one.arrays[0])}
        for name in MOVED:
            work[name] = ours[name]
            work |= {f"{name} {peer}": group[name] for peer, group in peers.items()}
        gpu = {"clock": time.perf_counter, "sync": torch.cuda.synchronize}
        seconds = alternate(work, 5 if options.quick else 25, **(gpu if device == "cuda" else {}))
    best = {name: min(times) for name, times in seconds.items()}
    size = one.arrays[0].nbytes / 1e9
    copied = 2 * size / best["copy"]
    for name, moved in MOVED.items():
        for peer in peers:
            goal = EAGER_GOAL if peer == "eager" else None
            what = f"{name}, {kind}, against {peer}"
            times = (1e3 * best[name], 1e3 * best[f"{name} {peer}"])
            found.append(faster(what, *times, goal, device=device))
        rate, what = moved * size / best[name], f"{name}, {kind}, against a copy"
        found.append(Row(what, device, rate, copied, "GB/s", rate / copied, COPY_GOAL[device]))
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--compile", action="store_true", help="also against torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("no GPU here: its rows are left out")
            continue
        for shape in SHAPES[device]:
            for dtype in (torch.float32, torch.bfloat16):
                found += rows_of(shape, dtype, device, options)
    report(found, ("torch", "numba", "llvmlite", "triton"), options.json)


if __name__ == "__main__":
    main()
