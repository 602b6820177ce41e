"""Networks' prunable weights as lists of random tensors, and the most memory that a job takes."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

_C = ctypes.CDLL(None)
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def shapes(name: str) -> list[torch.Size]:
    """Return the shapes of the convolutions and linear layers of a torchvision network."""
    with torch.device("meta"):
        network = getattr(torchvision.models, name)()
    return [value.shape for value in network.parameters() if value.ndim in (2, 4)]


def drawn(sizes: list[torch.Size], seed: int, device: str = "cpu") -> list[Tensor]:
    """Return a normal tensor of each size."""
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(size, generator=generator, device=device) for size in sizes]


def extra_mb(job: Callable[[], object], device: str = "cpu") -> float | None:
    """Return how far a job's peak lies above what was held before it; None where not told."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not RESET.exists():
        return None
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)  # memory freed but held would be used again, and not be seen
    RESET.write_text("5")
    before = _kilobytes("VmRSS")
    job()
    return max(0, _kilobytes("VmHWM") - before) * 1024 / 1e6


def _kilobytes(key: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
