"""Ranks for tests: processes that meet through a file, so that no port is needed."""

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import FileStore

from dop_fast import ranks

T = TypeVar("T")


def together(count: int, work: Callable[..., T], *arguments: Any) -> list[T]:
    """Return what `work(*arguments)` returns on each of `count` ranks; of one, in this process.

    `work` is a function of a module, and what it takes and returns can be pickled.
    """
    if count == 1:
        return [work(*arguments)]
    multiprocessing.set_forkserver_preload(["dop_fast.pipeline"])  # imported once, not every time
    with tempfile.TemporaryDirectory() as folder:
        job = pickle.dumps((work, arguments))  # else ranks would share the memory of tensors
        torch.multiprocessing.start_processes(
            _rank, (count, folder, job), count, start_method="forkserver"
        )
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def _rank(rank: int, count: int, folder: str, job: bytes) -> None:
    torch.set_num_threads(1)
    work, arguments = pickle.loads(job)
    store = FileStore(f"{folder}/store", count)
    with ranks.joined(ranks.World(rank, count, count), store):
        found = work(*arguments)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))
