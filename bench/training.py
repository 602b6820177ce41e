"""Training: torchvision's reference loop, in fp32 NCHW and with channels-last and AMP, and ours.

Images a second of one batch that lies in memory, and of epochs with the loader: images in memory
with CIFAR-10's augmentation, files of photographs with ImageNet's. On a CPU one thread, the CPU
time of the process. What holding the mask costs is a hundredth of a step's noise: it is measured
as the difference of the optimizer's steps alone, beside the step. On a GPU also how much of the
time it is busy. Masks keep a tenth of the weights.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from _timing import Row, alternate, arguments, data_folder, faster, report
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dop_fast import models
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.images import ImageSet, normalise, open_images
from dop_fast.masks import MaskSet
from dop_fast.training.loader import Pixels, readers, training_batches, training_order
from dop_fast.training.step import Step

GOALS = {"cpu": 2.2, "cuda": 5.0}
HELD_GOAL, BUSY_GOAL = 1 / 1.01, 0.9
CASES = {
    "cpu": (("resnet20", 32, 128), ("resnet32", 32, 128), ("resnet18", 224, 16),
            ("resnet50", 224, 8)),
    "cuda": (("resnet20", 32, 128), ("resnet18", 224, 128), ("resnet50", 224, 128)),
}  # fmt: skip
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
STEPS = 5  # of the optimizer alone, in one measurement
LOOP, SHORT = "torchvision's loop in fp32 NCHW", "the loop in bf16 and channels-last"


@dataclass(frozen=True)
class Bench:
    """How much is measured, and where."""

    device: torch.device
    quick: bool

    def images_per_s(self, jobs: dict[str, Callable[[], object]], images: int) -> dict[str, float]:
        """Return the speed of jobs that take so many images each."""
        best = self.seconds(jobs, 2 if self.quick else 5)
        return {name: images / value for name, value in best.items()}

    def seconds(self, jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        """Return the least time of each job."""
        if self.device.type == "cuda":
            clock, sync = time.perf_counter, torch.cuda.synchronize
        else:
            clock, sync = time.process_time, lambda: None
        found = alternate(jobs, repeats, clock=clock, sync=sync)
        return {name: min(values) for name, values in found.items()}


class Reference:
    """The step of torchvision's references/classification/train.py."""

    def __init__(self, model: nn.Module, device: torch.device, short: bool) -> None:
        self.format = torch.channels_last if short else torch.contiguous_format
        self.model = model.to(device, memory_format=self.format).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.criterion, self.device, self.short = nn.CrossEntropyLoss(), device, short

    def __call__(self, image: Tensor, target: Tensor) -> None:
        """Learn from float32[k 3 s s] and int64[k]."""
        image = image.to(self.device, memory_format=self.format, non_blocking=True)
        target = target.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.short):
            loss = self.criterion(self.model(image), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def network(name: str, size: int) -> nn.Module:
    return models.build(name, 10 if size == 32 else 1000, 0)


def sparse(model: nn.Module) -> MaskSet:
    drawn = torch.Generator().manual_seed(0)
    return MaskSet(
        {
            name: torch.rand(weight.shape, generator=drawn) < 0.1
            for name, weight in models.prunable(model).items()
        }
    )


def ours(name: str, size: int, device: torch.device, masked: bool) -> Step:
    model = network(name, size).train()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Step(model, DataConfig(size=size), TrainConfig(), sparse(model) if masked else None)


def steps_of(bench: Bench, name: str, size: int, count: int) -> list[Row]:
    """Compare steps on one batch that is on the device."""
    device = bench.device
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (count,), device=device)
    image = normalise(pixels, (0.5,) * 3, (0.25,) * 3).contiguous()
    dense, masked = (ours(name, size, device, kind) for kind in (False, True))
    jobs: dict[str, Callable[[], object]] = {
        "fp32": partial(Reference(network(name, size), device, False), image, labels),
        "amp": partial(Reference(network(name, size), device, True), image, labels),
        "dense": partial(dense, pixels, labels, SGD["lr"]),
        "masked": partial(masked, pixels, labels, SGD["lr"]),
    }
    speed = bench.images_per_s(jobs, count)
    what = f"{name}, {size} px, batch {count}"
    row, goal = partial(quicker, speed, device.type), GOALS[device.type]
    return [
        row(f"{what}: dense, {LOOP}", ("dense", "fp32"), goal),
        row(f"{what}: masked, the same loop", ("masked", "fp32"), goal),
        row(f"{what}: dense, {SHORT}", ("dense", "amp")),
        *optimizers_of(bench, what, dense, masked, 1e3 * count / speed["dense"]),
    ]


def optimizers_of(
    bench: Bench, what: str, dense: Step, masked: Step, step_ms: float
) -> Iterator[Row]:
    """Compare the optimizer's steps alone: dense, masked, and torch's with a mask's product."""
    weights = masked.optimizer.param_groups[0]["params"]
    torchs = torch.optim.SGD(weights, **SGD, fused=True)
    held = [weight for weight in weights if weight.ndim > 1]
    keep = [torch.empty_like(weight, requires_grad=False).bernoulli_(0.1) for weight in held]

    def product() -> None:
        torch._foreach_mul_([weight.grad for weight in held], keep)
        torchs.step()

    jobs = {
        "dense": partial(many, dense.optimizer.step),
        "masked": partial(many, masked.optimizer.step),
        "product": partial(many, product),
    }
    cost = {name: 1e3 * x / STEPS for name, x in bench.seconds(jobs, 5).items()}
    device = bench.device.type
    extra = max(0.0, cost["masked"] - cost["dense"])
    yield faster(
        f"{what}: a step with the mask held, without", step_ms + extra, step_ms, HELD_GOAL,
        device=device,
    )  # fmt: skip
    yield faster(
        f"{what}: the masked update, torch's fused SGD after a product with the mask",
        cost["masked"], cost["product"], device=device,
    )  # fmt: skip


def many(job: Callable[[], object]) -> None:
    for _ in range(STEPS):
        job()


def quicker(
    speed: dict[str, float], device: str, what: str, pair: tuple[str, str],
    goal: float | None = None,
) -> Row:  # fmt: skip
    """Return the row of two jobs' speeds, ours first."""
    one, other = (speed[name] for name in pair)
    return Row(what, device, one, other, "images/s", one / other, goal)


@dataclass(frozen=True)
class Photographs(Dataset[tuple[Tensor, int]]):
    """What torchvision's loop reads: an image, transformed by its recipe, and its label."""

    open: Callable[[int], Image.Image]
    labels: list[int]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.open(index)), self.labels[index]


def recipe(size: int) -> Callable[[Image.Image], Tensor]:
    """Return the usual augmentation at this size, as torchvision's transforms."""
    crop = (
        v2.RandomCrop(32, 4, padding_mode="reflect") if size == 32 else v2.RandomResizedCrop(size)
    )
    scaled = v2.ToDtype(torch.float32, scale=True)
    tail = [
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        scaled,
        v2.Normalize((0.5,) * 3, (0.25,) * 3),
    ]
    made: Callable[[Image.Image], Tensor] = v2.Compose([crop, *tail])
    return made


def epochs_of(bench: Bench, name: str, path: Path, size: int, counts: tuple[int, int]) -> list[Row]:
    """Compare epochs of real images, loader included; `counts`: of images and of a batch."""
    count, batch = counts
    images, _ = open_images(DataConfig(path=str(path), size=size), path.parent, 0)
    images = replace(images, labels=images.labels[:count], names=images.names[:count])
    one, other = (partial(f, bench.device, images, name, batch) for f in (our_epoch, their_epoch))
    jobs = {"ours": one(), "fp32": other(False), "amp": other(True)}
    speed = bench.images_per_s(jobs, count)
    where = "in memory" if size == 32 else "files"
    what, device = f"{name}, {size} px, {where}, loader included", bench.device.type
    row = partial(quicker, speed, device)
    rows = [
        row(f"{what}: masked, {LOOP}", ("ours", "fp32"), GOALS[device]),
        row(f"{what}: masked, {SHORT}", ("ours", "amp")),
    ]
    if device == "cuda":
        share = busy_share(jobs["ours"])
        rows.append(Row(f"{what}: share of time the GPU is busy", device, share, 1.0, "", share,
                        BUSY_GOAL))  # fmt: skip
    return rows


def our_epoch(
    device: torch.device, images: ImageSet, name: str, batch: int
) -> Callable[[], object]:
    step = ours(name, images.size, device, True)
    pixels = Pixels(images, TrainConfig().workers, device)

    def epoch() -> None:
        chunks = training_order(len(images), batch, 0, 1)
        for image, label in training_batches(pixels, chunks, "auto", 0, 1):
            step(image, label, SGD["lr"])

    return epoch


def their_epoch(
    device: torch.device, images: ImageSet, name: str, batch: int, short: bool
) -> Callable[[], object]:
    step, read = Reference(network(name, images.size), device, short), images.decode
    if images.size == 32:  # as torchvision's CIFAR10 has them
        arrays = images.load(range(len(images)))

        def read(index: int) -> Image.Image:
            return Image.fromarray(arrays[index])

    loader = DataLoader(
        Photographs(read, images.labels.tolist(), recipe(images.size)),
        batch, shuffle=True, pin_memory=device.type == "cuda",
        num_workers=readers(TrainConfig().workers, device),
    )  # fmt: skip

    def epoch() -> None:
        for image, target in loader:
            step(image, target)

    return epoch


def busy_share(job: Callable[[], object]) -> float:
    """Return the share of the time in which the GPU runs a kernel or a copy."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        job()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events())
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6 / (time.perf_counter() - start)


def rows_on(bench: Bench, data: Path | None) -> Iterable[Row]:
    for name, size, batch in CASES[bench.device.type]:
        yield from steps_of(bench, name, size, batch)
    if data is None:
        print("left out: the loader, whose images are not here")
        return
    small, large = ((640, 128), (32, 16)) if bench.quick else ((2560, 128), (128, 16))
    if bench.device.type == "cuda":
        small, large = (50_000, 128), (3_000, 128)
    yield from epochs_of(bench, "resnet20", data / "cifar10.zip", 32, small)
    yield from epochs_of(bench, "resnet18", data / "flowers.zip", 224, large)


def main() -> None:
    options = arguments(__doc__ or "", data=True).parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("left out: the rows of a GPU, there is none")
            continue
        rows += rows_on(Bench(torch.device(device), options.quick), data_folder(options.data))
    report(rows, ["torch", "torchvision", "triton", "numba"], options.json)


if __name__ == "__main__":
    main()
