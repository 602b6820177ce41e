"""Whole pieces of work on several threads, against PyTorch's own threads within each operation.

Both on as many threads as there are cores. Beside the time, in how many layers the result differs
from that of one thread: of ours in none.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from _timing import Row, alternate, arguments, faster, report
from torch import Tensor
from torch.nn.functional import cross_entropy

from dop_fast import engine, models, threads
from dop_fast.concepts.activations import Probe

Named = dict[str, Tensor]
GOAL = 1.0


def draw(count: int, size: int, side: int) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(0)
    shape = (size, 3, side, side)
    return [(torch.randn(shape, generator=stream), torch.arange(size) % 10) for _ in range(count)]


def scoring(name: str, batches: list[tuple[Tensor, Tensor]]) -> Named:
    return engine.hessian_gradient(models.build(name, 10, 0), batches, cross_entropy)


def forwards(name: str, batches: list[tuple[Tensor, Tensor]], amp: str) -> Named:
    model = models.build(name, 10, 0)
    probe = Probe(model, models.bottleneck(model, batches[0][0][:1]), torch.device("cpu"), amp)
    images = [one.to(probe.dtype, memory_format=torch.channels_last) for one, _ in batches]
    with threads.single():
        return dict(enumerate(probe.activations(images)))  # type: ignore[arg-type]


def on(count: int, job: Callable[[], Named]) -> Named:
    torch.set_num_threads(count)
    return job()


def within(count: int, job: Callable[[], Named]) -> Named:
    """Run a job as if PyTorch's threads were not held to one."""
    with patch.object(threads, "single", nullcontext):
        return on(count, job)


def rows_of(what: str, job: Callable[[], Named], cores: int, repeats: int) -> list[Row]:
    found = alternate(
        {"ours": partial(on, cores, job), "peer": partial(within, cores, job)},
        repeats, clock=time.perf_counter,
    )  # fmt: skip
    ours, peer = (1e3 * min(found[name]) for name in ("ours", "peer"))
    alone = on(1, job)
    off = [
        sum(not torch.equal(alone[key], other[key]) for key in alone)
        for other in (on(cores, job), within(cores, job))
    ]
    return [
        faster(f"{what}, {cores} threads", ours, peer, GOAL),
        Row(
            f"{what}, of {len(alone)} tensors differ", "cpu", off[0], off[1], "tensors", None, None
        ),
    ]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    cores, few = torch.get_num_threads(), options.quick
    repeats = 1 if few else 3
    small, large = draw(8, 32 if few else 100, 32), draw(4, 2 if few else 8, 224)
    photos = draw(4 if few else 8, 16, 224)
    jobs = {
        "GraSP, ResNet-20, 8 chunks": partial(scoring, "resnet20", small),
        "GraSP, ResNet-50, 4 chunks": partial(scoring, "resnet50", large),
        "forwards, ResNet-18, bf16": partial(forwards, "resnet18", photos, "auto"),
        "forwards, ResNet-50, fp32": partial(forwards, "resnet50", photos[:4], "off"),
    }
    rows = [row for what, job in jobs.items() for row in rows_of(what, job, cores, repeats)]
    torch.set_num_threads(cores)
    report(rows, ("torch", "numba"), options.json)


if __name__ == "__main__":
    main()
