"""Where one GraSP scoring of a ResNet-50 spends its time, double backward and the engine.

By torch.profiler, on one thread, or on a GPU by kernels' time. What no PyTorch operation is
seen doing, our fused kernels and Python do.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from _timing import arguments, machine, versions
from hvp import Case, Scores, double_backward, grasp
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
KINDS = {
    "convolutions": ("conv", "cudnn", "xmma", "gemm", "::mm", "addmm", "bmm"),
    "batch norm": ("batch_norm", "bn_", "batchnorm"),
    "copies and fills": ("copy", "fill", "zero", "cat", "to_copy", "empty"),
}


def kind(name: str) -> str:
    """Return which group of operations a name belongs to."""
    found = (group for group, parts in KINDS.items() if any(part in name for part in parts))
    return next(found, "pointwise and sums")


def spent(job: Callable[[], Scores]) -> tuple[dict[str, float], float]:
    """Return seconds by group, and all seconds."""
    job()
    activities = [ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        start = time.perf_counter()
        job()
        if CUDA:
            torch.cuda.synchronize()
        total = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        own = event.self_device_time_total if CUDA else event.self_cpu_time_total
        if own and (CUDA or event.key.startswith("aten::")):
            seconds[kind(event.key)] += own / 1e6
    seconds["fused kernels and Python"] = max(total - sum(seconds.values()), 0)
    return dict(seconds), total


def main() -> None:
    """Print a column for each way."""
    args = arguments("Profile of one scoring").parse_args()
    torch.set_num_threads(1)
    device = "cuda" if CUDA else "cpu"
    case = Case("resnet50", 224, 128 if CUDA else 4 if args.quick else 16)
    model, batches = case.make(device)
    jobs = {
        "double backward": partial(double_backward, model, batches),
        "exact": partial(grasp, model, batches),
        "exact, recomputing": partial(grasp, model, batches, keep=False),
        "fast": partial(grasp, model, batches, "fast"),
    }
    table = {name: spent(job) for name, job in jobs.items()}
    print(f"{case}, {device}: seconds")
    print(f"{'':26}" + "".join(f"{name:>20}" for name in table))
    for group in (*KINDS, "pointwise and sums", "fused kernels and Python"):
        cells = (seconds.get(group, 0) for seconds, _ in table.values())
        print(f"{group:26}" + "".join(f"{value:20.3f}" for value in cells))
    print(f"{'all':26}" + "".join(f"{total:20.3f}" for _, total in table.values()))
    if args.json:
        record = {"machine": machine(), "versions": versions(("torch", "triton", "numba"))}
        rows = {
            name: {"seconds": seconds, "all": total} for name, (seconds, total) in table.items()
        }
        args.json.write_text(
            json.dumps(record | {"case": str(case), "ways": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
