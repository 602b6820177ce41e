"""The ranks of a job as torchrun's environment tells them, and which of them speaks."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from dop_fast.errors import ConfigError, DopFastError, RankError

Who = Literal["first", "all", "none"]
"""Who does a command's work: the first rank, all of them together, or none, which is refused."""

_met = False


def _number(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone))


def first() -> bool:
    """Return whether this process speaks for its job; one that torchrun did not start does."""
    return _number("RANK", 0) == 0


def tells_failure() -> bool:
    """Return whether this process says what went wrong: once for a machine before ranks meet."""
    return _met or _number("LOCAL_RANK", 0) == 0


def restarted() -> bool:
    """Return whether torchrun started the job anew after a failure."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


@contextmanager
def meeting(who: Who, device: str) -> Iterator[bool]:
    """Meet the other ranks, and yield whether this one has a part in the work."""
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        yield True
    elif who == "first":
        yield first()
    elif who == "none":
        raise ConfigError(
            "torchrun is for one job of many ranks, and each process has its own work here",
            "start it by itself, once for each GPU: they share the work through the workspace",
        )
    else:
        _take_gpu(device)
        with _joined(count):
            yield True


def _take_gpu(device: str) -> None:
    """Make the rank's own GPU the current one."""
    if device.startswith("cuda:"):
        raise ConfigError("every rank takes a GPU of its own", "leave out --device")
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return
    have, local = torch.cuda.device_count(), _number("LOCAL_RANK", 0)
    if local >= have:
        raise ConfigError(
            f"{_number('LOCAL_WORLD_SIZE', 1)} ranks have {have} GPUs on this machine",
            f"torchrun --nproc-per-node {have} ..., or --device cpu",
        )
    torch.cuda.set_device(local)


@contextmanager
def _joined(count: int) -> Iterator[None]:
    """Work together; of what goes wrong, the rank that is first to say so does."""
    from torch.distributed.rendezvous import rendezvous

    from dop_fast import ranks

    global _met
    world = ranks.World(_number("RANK", 0), count, _number("LOCAL_WORLD_SIZE", 1))
    found, *_ = next(rendezvous("env://"))
    store = ranks.begun(world, found)
    signal.signal(signal.SIGTERM, _stop)  # so torchrun ends ranks when another one failed
    _met = True
    try:
        with ranks.joined(world, store):
            yield
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)  # the way out through C++ aborts at times, for threads that still run there
    except (DopFastError, OSError, RuntimeError, KeyboardInterrupt) as error:
        if store.add("failed", 1) > 1:
            sys.exit(1)
        if ranks.lost(error):
            raise _lost() from error
        if isinstance(error, DopFastError) and not isinstance(error, RankError):
            error.message = f"rank {world.rank} of {count}: {error.message}"
        raise


def _lost() -> RankError:
    return RankError(
        "a rank of this job was lost; torchrun says which one",
        "run the same command again to go on; with torchrun --max-restarts 3 it does so by itself",
    )


def _stop(*_: Any) -> None:
    raise _lost()
