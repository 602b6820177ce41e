"""Scoring: the engine against straightforward double backward, in speed, memory and agreement.

The baseline of GraSP is the formula in plain PyTorch: two halves, NCHW, fp32, a gradient and a
double backward. That of SNIP is a gradient by masks that multiply the weights.
"""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _networks import extra_mb
from _timing import Row, alternate, arguments, faster, report
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dop_fast import engine, masks, models

CUDA = torch.cuda.is_available()
Scores = dict[str, Tensor]
Batches = list[tuple[Tensor, Tensor]]


def cooled(logits: Tensor, labels: Tensor) -> Tensor:
    """Return GraSP's loss: temperature 200."""
    return cross_entropy(logits / 200, labels)


@dataclass(frozen=True)
class Case:
    """A fresh network and the images it is scored on, in two halves."""

    name: str
    side: int
    images: int

    def make(self, device: str) -> tuple[nn.Module, Batches]:
        """Return the network and its halves."""
        model = models.build(self.name, 1000 if self.side > 64 else 10, 0).to(device)
        drawn = torch.Generator().manual_seed(0)
        images = torch.randn(self.images, 3, self.side, self.side, generator=drawn)
        labels = torch.randint(10, (self.images,), generator=drawn)
        halves = zip(images.to(device).chunk(2), labels.to(device).chunk(2), strict=True)
        return model, list(halves)

    def __str__(self) -> str:
        return f"{self.name}, {self.images} images of {self.side} px in two halves"


def double_backward(model: nn.Module, batches: Batches) -> Scores:
    """Return theta * Hg as published codes compute it."""
    model.train()
    weights = models.prunable(model)
    g: Any = None
    for images, labels in batches:
        part = torch.autograd.grad(cooled(model(images), labels), list(weights.values()))
        g = part if g is None else [a + b for a, b in zip(g, part, strict=True)]
    for weight in weights.values():
        weight.grad = None
    for images, labels in batches:
        loss = cooled(model(images), labels)
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        sum((a * b).sum() for a, b in zip(g, slopes, strict=True)).backward()
    return {name: weight.detach() * weight.grad for name, weight in weights.items()}


def mask_gradient(model: nn.Module, batches: Batches) -> Scores:
    """Return SNIP's |g * theta| as the gradient by masks of ones, as published codes compute it."""
    model.train()
    weights = models.prunable(model)
    ones = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    for images, labels in batches:
        masked = {name: w.detach() * ones[name] for name, w in weights.items()}
        cross_entropy(functional_call(model, masked, (images,)), labels).backward()
    return {name: one.grad.abs() for name, one in ones.items()}


def grasp(model: nn.Module, batches: Batches, precision: Any = "exact", **keep: bool) -> Scores:
    """Return theta * Hg by the engine."""
    hg = engine.hessian_gradient(model, batches, cooled, precision, **keep)
    return {name: hg[name] * weight.detach() for name, weight in models.prunable(model).items()}


def snip(model: nn.Module, batches: Batches, precision: Any = "exact") -> Scores:
    """Return |g * theta| by the engine."""
    g = engine.gradients(model, batches, cross_entropy, precision)
    return {name: (g[name] * w.detach()).abs() for name, w in models.prunable(model).items()}


def agreement(found: Scores, exact: Scores) -> tuple[float, float]:
    """Return the cosine of two scores, and the Jaccard index of what they keep at 95 %."""
    a, b = (torch.cat([x[name].double().flatten() for name in exact]) for x in (found, exact))
    kept = [masks.keep_top({"all": values}, 0.95).masks["all"] for values in (a, b)]
    jaccard = (kept[0] & kept[1]).sum() / (kept[0] | kept[1]).sum()
    return float(torch.cosine_similarity(a, b, 0)), float(jaccard)


def speed(case: Case, device: str, repeats: int, goals: dict[str, float]) -> Iterator[Row]:
    """Time GraSP and SNIP, ours and the baselines in turn."""
    model, batches = case.make(device)
    jobs: dict[str, Callable[[], Scores]] = {
        "double backward": partial(double_backward, deepcopy(model), batches),
        "mask gradient": partial(mask_gradient, deepcopy(model), batches),
    }
    for precision in ("exact", "fast"):
        jobs[f"GraSP {precision}"] = partial(grasp, model, batches, precision)
        jobs[f"GraSP {precision}, recomputing"] = partial(
            grasp, model, batches, precision, keep=False
        )
        jobs[f"SNIP {precision}"] = partial(snip, model, batches, precision)
    if device == "cuda":
        jobs["double backward, PyTorch's TF32"] = partial(tf32, jobs["double backward"])
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.thread_time
    best = {name: min(s) for name, s in alternate(jobs, repeats, clock=clock, sync=sync).items()}
    for name, seconds in best.items():
        peer = best["mask gradient" if "SNIP" in name else "double backward"]
        if name.startswith(("GraSP", "SNIP")):
            yield faster(
                f"{name}, {case}", seconds * 1e3, peer * 1e3, goals.get(name), device=device
            )
        if name == "GraSP fast" and device == "cuda":
            peer = best["double backward, PyTorch's TF32"]
            goal = goals.get("TF32")
            yield faster(
                f"{name} against TF32, {case}", seconds * 1e3, peer * 1e3, goal, device=device
            )


def tf32(job: Callable[[], Scores]) -> Scores:
    """Run a job with convolutions in TF32, which is PyTorch's default on a GPU."""
    found = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        return job()
    finally:
        torch.backends.cudnn.conv.fp32_precision = found


def memory(case: Case, device: str) -> Iterator[Row]:
    """Measure peaks above the model; `ratio` is the baseline's over ours, as for time."""
    model, batches = case.make(device)
    jobs = {
        "recomputing": (partial(grasp, model, batches, keep=False), 1 / 0.9),
        "kept": (partial(grasp, model, batches), 1 / 1.9),
        "fast, recomputing": (partial(grasp, model, batches, "fast", keep=False), 1 / 0.6),
        "fast, kept": (partial(grasp, model, batches, "fast"), None),
    }
    grasp(model, batches[:1])  # compile
    grasp(model, batches[:1], "fast")
    peer = extra_mb(partial(double_backward, deepcopy(model), batches), device)
    for name, (job, goal) in jobs.items():
        ours = extra_mb(job, device)
        if ours is not None:
            where = {"device": device, "unit": "MB"}
            yield faster(f"peak memory, GraSP {name}, {case}", ours, peer, goal, **where)


def agreements(case: Case, device: str) -> Iterator[Row]:
    """Compare with float64 double backward; `ratio` is the kept weights' Jaccard at 95 %."""
    model, batches = case.make(device)
    exact = double_backward(
        deepcopy(model).double(), [(images.double(), labels) for images, labels in batches]
    )
    jobs = {"double backward": partial(double_backward, deepcopy(model), batches)}
    if device == "cuda":
        jobs["double backward, PyTorch's TF32"] = partial(tf32, jobs["double backward"])
    for precision in ("exact", "fast"):
        jobs[f"GraSP {precision}"] = partial(grasp, model, batches, precision)
    for name, job in jobs.items():
        cosine, jaccard = agreement(job(), exact)
        what = f"agreement with float64, {name}, {case}: cosine; kept at 95 %"
        goal = 0.999 if name == "GraSP fast" else None
        yield Row(what, device, cosine, jaccard, "1", cosine, goal)


class Stream:
    """Batches of ImageNet's size, made when asked for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self._count):
            yield torch.ones(100, 3, 224, 224), torch.arange(100) % 10


def streaming(chunks: int) -> Iterator[Row]:
    """Compare the peaks of few chunks and of many, of a network that takes little time itself."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    few, many = (
        extra_mb(partial(engine.hessian_gradient, model, Stream(n), cooled, keep=False))
        for n in (4, chunks)
    )
    if few is not None and many is not None:
        what = f"host memory, {100 * chunks} images of 224 px, against 400"
        yield faster(what, many, few, 1 / 1.1, unit="MB")


def main() -> None:
    """Print the table."""
    args = arguments("Scoring against double backward").parse_args()
    torch.set_num_threads(1)
    device, repeats = ("cuda", 10) if CUDA else ("cpu", 1 if args.quick else 2)
    count = 128 if CUDA else 8 if args.quick else 16
    large = Case("resnet50", 224, count)
    small = [Case(name, 32, 200) for name in ("resnet20", "resnet32")]
    goals: dict[str, float] = (
        {"GraSP exact": 2, "GraSP fast": 5, "TF32": 3, "SNIP exact": 4}
        if CUDA
        else {"GraSP exact": 1.7, "GraSP fast": 2.5, "SNIP fast": 2.2}
    )
    rows = [*speed(large, device, repeats, goals)]
    for case in small:
        rows += speed(case, device, 2 * repeats, {"GraSP exact": 8 if CUDA else 2})
    rows += memory(large, device)
    rows += agreements(Case("resnet50", 224, 8), device)
    for case in small:
        rows += agreements(Case(case.name, 32, 100), device)
    rows += streaming(8 if args.quick else 375)
    report(rows, ("torch", "torchvision", "triton", "numba"), args.json)
    if not CUDA:
        print("left out: the rows of a GPU, for there is none")


if __name__ == "__main__":
    main()
