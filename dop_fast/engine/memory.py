"""How much memory is free."""

from contextlib import suppress
from pathlib import Path

import torch

from dop_fast import ranks


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on a device; 0 where the system does not tell.

    Ranks on one machine have equal shares of its memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(_available(), _allowed()) // ranks.here().beside


def _available() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return (
            int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        )
    return 0


def _allowed() -> int:
    """Return what the control group that we run in leaves."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # there is none, or it says "max"
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return limit - int((group / "memory.current").read_text(encoding="ascii"))
    return 2**63
