"""What dopfast runs on, which kernels work here, and whether each gives what its reference does."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from dop_fast import __version__
from dop_fast.kernels import bits, compose, dualnorm, masked_step, paste, score, select, slic
from dop_fast.kernels.paste import reference as plain_paste
from dop_fast.types import Segments

SETTINGS: Any = numba.config
PACKAGES = (
    "torch", "torchvision", "triton", "numba", "numpy", "scipy", "scikit-learn",
    "opencv-python-headless", "zarr", "numcodecs", "google-crc32c", "safetensors", "pillow",
    "click",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One kernel on one kind of device: whether it runs there, and agrees with its reference.

    `time_s` is that of the check, the reference included; `why` says why it is not active.
    """

    kernel: str
    device: str
    active: bool
    agrees: bool | None = None
    time_s: float = 0.0
    why: str = ""


def facts(folder: Path) -> dict[str, Any]:
    """Return versions, machine, devices, threads, and the disk of `folder`; GB are 10^9 bytes."""
    disk = shutil.disk_usage(folder)
    return {
        "versions": {"dopfast": __version__, "python": platform.python_version(), **_packages()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "devices": _devices(),
        "threads": {"cpus": os.cpu_count(), "torch": torch.get_num_threads()},  # kernels' too
        "disk": {"free_gb": round(disk.free / 1e9, 1), "of_gb": round(disk.total / 1e9, 1)},
    }  # fmt: skip


def checks() -> list[Check]:
    """Run every kernel on small input, on the CPU and on a GPU where there is one."""
    made = []
    for name, check in CHECKS.items():
        made.append(_checked(name, "cpu", check))
        if name in ON_GPU:
            why = _why_no_gpu()
            made.append(Check(name, "gpu", False, why=why) if why else _checked(name, "gpu", check))
    return made


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_properties(at) for at in range(torch.cuda.device_count())]
    return ["cpu"] + [
        f"cuda:{at} {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
        for at, gpu in enumerate(gpus)
    ]


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "" if find_spec("triton") else "Triton is not installed"


def _checked(name: str, device: str, check: Callable[[str], bool]) -> Check:
    start = time.perf_counter()
    agrees = check("cuda" if device == "gpu" else "cpu")
    slow = "not compiled: NUMBA_DISABLE_JIT is set" if SETTINGS.DISABLE_JIT else ""
    why = slow if device == "cpu" else ""
    return Check(name, device, not why, agrees, time.perf_counter() - start, why)


def _segments() -> tuple[Segments, Any]:
    """Return three segments, each of its own image, and the images."""
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 0, 9, 7], [2, 3, 14, 16], [5, 1, 6, 12]], np.int32)
    masks = [rng.random((bottom - top, right - left)) < 0.7 for top, left, bottom, right in boxes]
    packed = [np.packbits(mask) for mask in masks]
    made = Segments(
        np.arange(3, dtype=np.int32), boxes, np.full(3, 15, np.int16),
        np.cumsum([0, *map(len, packed)], dtype=np.int64), np.concatenate(packed), (16, 16),
    )  # fmt: skip
    return made, rng.integers(0, 256, (3, 16, 16, 3), np.uint8)


def _slic(device: str) -> bool:
    image = np.random.default_rng(0).integers(0, 256, (1, 24, 32, 3), np.uint8)
    found = slic.slic(image, (12,), iterations=3)
    return np.array_equal(found, slic.reference.slic(image, (12,), 20.0, 1.0, 3, False))


def _paste(device: str) -> bool:
    segments, sources = _segments()
    queue = np.array([[0], [1], [2], [1], [0]])
    starts = np.array([0, 2, 5])
    every = [
        (
            module.cover(segments, queue, 0.4, 2),
            *module.paint(segments, sources, queue[:, 0], starts, 117),
            module.visible(segments, queue[:, 0], starts),
        )
        for module in (paste, plain_paste)
    ]
    return all(map(np.array_equal, *every))


def _compose(device: str) -> bool:
    segments, sources = _segments()
    entry, index = compose.Entry(20, 117, (0.0,) * 3, (1 / 255,) * 3), np.arange(3)
    out = torch.empty((3, 20, 20, 3), device=device)
    found = compose.compose(torch.from_numpy(sources).to(device), segments, index, entry, out)
    expected = compose.reference.compose(sources, segments, index, entry)
    # normalised pixels are whole numbers up to 255, but for float32's rounding
    return bool(np.allclose(found.permute(0, 2, 3, 1).cpu(), expected, rtol=0, atol=1e-4))


def _dualnorm(device: str) -> bool:
    y, residual = _noise((64, 8), (64, 8))
    weight, bias = _noise((8,), (8,))
    norm = dualnorm.Norm(*dualnorm.reference.moments(y, 1e-5), weight, 1e-5)
    expected = dualnorm.reference.forward(norm, y, bias, residual, True)
    moved = dualnorm.Norm(norm.mean.to(device), norm.rstd.to(device), weight.to(device), 1e-5)
    found = dualnorm.forward(moved, y.to(device), bias.to(device), residual.to(device), True)
    return torch.allclose(found.cpu(), expected, rtol=0, atol=2e-5)  # of sums in another order


def _score(device: str) -> bool:
    theta, factor = _noise((50, 7), (50, 7))
    rule = score.Rule(absolute=True)
    found, expected = torch.zeros(50, 7, device=device), torch.zeros(50, 7)
    score.score_([found], [theta.to(device)], [factor.to(device)], rule)
    score.reference.score_([expected], [theta], [factor], rule)
    return torch.equal(found.cpu(), expected)


def _select(device: str) -> bool:
    scores = [values.round(decimals=1) for values in _noise((40, 9), (333,))]  # ties too
    found = select.top([values.to(device) for values in scores], 100)
    expected = select.reference.top(scores, 100)
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def _bits(device: str) -> bool:
    (weight,) = _noise((37, 5))
    packed = bits.pack(weight > 0)
    found, expected = weight.to(device, copy=True), weight.clone()
    bits.apply_([found], [packed.to(device)])
    bits.reference.apply_([expected], [packed])
    return torch.equal(found.cpu(), expected)


def _masked_step(device: str) -> bool:
    weight, gradient, momentum = _noise((37, 5), (37, 5), (37, 5))
    rule, packed = masked_step.Rule(0.1, 0.9, 1e-4), bits.pack(weight > 0)
    found, moving = weight.to(device, copy=True), momentum.to(device, copy=True)
    masked_step.step_([found], [gradient.to(device)], [moving], [packed.to(device)], rule)
    masked_step.reference.step_([weight], [gradient], [momentum], [packed], rule)
    # a fused multiply-add rounds once where two operations round twice
    return torch.allclose(found.cpu(), weight, rtol=1e-6, atol=1e-7)


def _noise(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


CHECKS: dict[str, Callable[[str], bool]] = {
    "slic": _slic, "paste": _paste, "compose": _compose, "dualnorm": _dualnorm, "score": _score,
    "select": _select, "bits": _bits, "masked_step": _masked_step,
}  # fmt: skip
ON_GPU = tuple(name for name in CHECKS if name not in ("slic", "paste"))
