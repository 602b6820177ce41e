"""Fused scores of all layers against eager PyTorch and torch.compile.

On the CPU one thread, its CPU time. There a layer's intermediate results stay in the cache, so
that eager PyTorch reads little more from memory than one pass does, unless layers are large. On
a GPU the measure is the bandwidth of a copy. Scores into fresh memory cost its page faults.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial

import torch
from _networks import drawn, extra_mb, shapes
from _timing import Row, alternate, arguments, faster, report
from torch import Tensor

from dop_fast.kernels import bits
from dop_fast.kernels.score import Rule, score_

CPU_GOAL, BANDWIDTH_GOAL, CALLS = 2.0, 0.9, 20
Layers = list[Tensor]


def eager(out: Layers, weights: Layers, factors: Layers, masks: Layers | None) -> None:
    """Add |theta g m| layer by layer, the mask as bools."""
    for i, score in enumerate(out):
        value = weights[i] * factors[i]
        if masks is not None:
            value *= masks[i]
        score.add_(value.abs_())


def _fused(score: Tensor, weight: Tensor, factor: Tensor) -> None:
    score.add_((weight * factor).abs())


def compiled(out: Layers, weights: Layers, factors: Layers, fused: Callable[..., None]) -> None:
    for layer in zip(out, weights, factors, strict=True):
        fused(*layer)


def on_cpu(name: str, repeats: int) -> list[Row]:
    sizes = shapes(name)
    out, weights, factors = (drawn(sizes, seed) for seed in range(3))
    masks = [weight > 0 for weight in weights]
    packed = [bits.pack(mask) for mask in masks]
    add, new = Rule(True, add=True), Rule(True)

    def fresh() -> None:
        score_([torch.empty_like(x) for x in weights], weights, factors, new)

    jobs: dict[str, Callable[[], object]] = {
        "add": lambda: score_(out, weights, factors, add),
        "add eager": lambda: eager(out, weights, factors, None),
        "masked": lambda: score_(out, weights, factors, add, packed),
        "masked eager": lambda: eager(out, weights, factors, masks),
        "new": fresh,
        "new eager": lambda: [(w * f).abs_() for w, f in zip(weights, factors, strict=True)],
        "apply": lambda: bits.apply_(out, packed),
        "apply eager": lambda: [s.mul_(m) for s, m in zip(out, masks, strict=True)],
    }
    if shutil.which("g++"):
        fused = torch.compile(_fused, dynamic=True)
        jobs["add compiled"] = lambda: compiled(out, weights, factors, fused)
    else:
        print("left out: torch.compile, which needs a C++ compiler")
    cost = {job: min(x) * 1e3 for job, x in alternate(jobs, repeats).items()}
    extra = [extra_mb(jobs[job]) for job in ("add", "add eager")]
    size = sum(map(torch.Size.numel, sizes)) / 1e6
    what = f"{name} ({size:.1f} M weights)"
    rows = [
        faster(f"{what}: add |theta g|, eager", cost["add"], cost["add eager"], CPU_GOAL),
        faster(f"{what}: add |theta g|, torch.compile", cost["add"], cost.get("add compiled")),
        faster(f"{what}: add |theta g m|, eager", cost["masked"], cost["masked eager"], CPU_GOAL),
        faster(f"{what}: |theta g| into fresh memory, eager", cost["new"], cost["new eager"]),
        faster(f"{what}: mask the weights, eager product", cost["apply"], cost["apply eager"]),
    ]
    if extra[0] is not None and extra[1] is not None:
        what = f"{what}: more memory at the peak of adding, eager"
        rows.append(Row(what, "cpu", extra[0], extra[1], "MB", None, None))
    return rows


def on_gpu(name: str, sizes: list[torch.Size], repeats: int) -> list[Row]:
    """Compare bandwidths, of bytes that must be moved, with a copy's."""
    out, weights, factors = (drawn(sizes, seed, "cuda") for seed in range(3))
    packed = [bits.pack(weight > 0) for weight in weights]
    count = sum(map(torch.Size.numel, sizes))
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)

    def times(job: Callable[[], object]) -> None:
        for _ in range(CALLS):
            job()

    work = {
        "add |theta g|": (16, Rule(True, add=True), None),
        "|theta g|": (12, Rule(True), None),
        "add |theta g m|": (16.125, Rule(True, add=True), packed),
    }
    jobs = {
        what: partial(times, partial(score_, out, weights, factors, rule, masks))
        for what, (_, rule, masks) in work.items()
    }
    jobs["eager"] = partial(times, lambda: eager(out, weights, factors, None))
    jobs["copy"] = partial(times, lambda: target.copy_(source))
    seconds = alternate(jobs, repeats, clock=time.perf_counter, sync=torch.cuda.synchronize)
    cost = {what: min(x) / CALLS for what, x in seconds.items()}
    copy = 8 * source.numel() / cost["copy"] / 1e9
    rows = []
    for what, (size, _, _) in work.items():
        speed = size * count / cost[what] / 1e9
        label = f"{name}: {what}, a copy"
        rows.append(Row(label, "cuda", speed, copy, "GB/s", speed / copy, BANDWIDTH_GOAL))
    ours, peer = cost["add |theta g|"] * 1e3, cost["eager"] * 1e3
    return [*rows, faster(f"{name}: add |theta g|, eager", ours, peer, device="cuda")]


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 15
    rows = on_cpu("resnet50", repeats)
    if not options.quick:
        rows += on_cpu("vgg16", repeats)
    if torch.cuda.is_available():
        rows += on_gpu("resnet50", shapes("resnet50"), repeats)
        rows += on_gpu("20 layers of 2^24", [torch.Size([1 << 24])] * 20, repeats)
    else:
        print("left out: the rows of a GPU, there is none")
    report(rows, ["torch", "triton", "numba", "numpy"], options.json)


if __name__ == "__main__":
    main()
