"""The ranks of a job: processes that run the same program, each with its share of the work.

A process that has not `joined` others is a world of one, in which everything here is its own
answer. All ranks call what waits for the others, which is all but `here` and `share`, in the same
order. They may be on several machines that see the same files.
"""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar, runtime_checkable
from uuid import NAMESPACE_OID, uuid4, uuid5

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from dop_fast.errors import RankError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a rank waits for the others, of which one may be slow; torchrun ends what is dead."""


@dataclass(frozen=True)
class World:
    """A process is number `rank`, from 0, of `count`, of which `beside` run on its machine."""

    rank: int = 0
    count: int = 1
    beside: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks for all."""
        return self.rank == 0


_here = World()


def here() -> World:
    """Return which of how many ranks this process is."""
    return _here


def begun(world: World, store: Store) -> Store:
    """Return a part of the store that is of this start of the job alone.

    torchrun keeps the store when it starts ranks anew, and their old addresses in it. Each rank
    leaves a new token; the first reads out all of them until every one has heard its own.
    """
    own, heard = uuid4().hex, ""
    store.set(f"token/{world.rank}", own)
    while True:
        if world.first:
            tokens = [store.get(f"token/{rank}").decode() for rank in range(world.count)]
            store.set("roll", " ".join(tokens))
        roll = store.get("roll").decode()
        name = f"roll/{uuid5(NAMESPACE_OID, roll)}"
        if own in roll:
            if store.add(name, 1 if roll != heard else 0) == world.count:
                return PrefixStore(name, store)
            heard = roll
        time.sleep(0.02)


@contextmanager
def joined(world: World, store: Store) -> Iterator[None]:
    """Work with the other ranks, which meet at `store`, until the end of the block.

    Over gloo between CPUs and NCCL between GPUs, of which a rank has PyTorch's current one.
    """
    global _here
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.count, timeout=PATIENCE
    )
    _here = world
    try:
        yield
        gather(None)  # who leaves early closes the connections that others may still be making
    finally:
        _here = World()
    dist.destroy_process_group()  # not after an error: it would wait for the others


def lost(error: BaseException) -> bool:
    """Return whether an error says that another rank is gone."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def gather(value: T) -> list[T]:
    """Return what each rank gave, in their order."""
    if _here.count == 1:
        return [value]
    found: list[Any] = [None] * _here.count
    dist.all_gather_object(found, value)
    return found


def once(make: Callable[[], T]) -> T:
    """Return what `make` returns on the first rank, where alone it is called."""
    return gather(make() if _here.first else None)[0]  # type: ignore[return-value]


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first rank go through the block before the others do."""
    if not _here.first:
        gather(None)
    yield
    if _here.first:
        gather(None)


def same(make: Callable[[], object], what: str) -> None:
    """Raise `RankError` where ranks do not `make` equals; one alone does not make anything."""
    if _here.count == 1:
        return
    found = gather(make())
    odd = [str(rank) for rank, other in enumerate(found) if other != found[0]]
    if odd:
        raise RankError(
            f"{what} of rank {', '.join(odd)} differ from those of rank 0",
            "run on machines of one kind, with the same versions",
        )


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's items, which are dealt out in turn."""
    return items[_here.rank :: _here.count]


def collect(own: Sequence[T]) -> list[T]:
    """Return one item for each that was dealt out, in their order, from those of each `share`."""
    parts = gather(own)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@runtime_checkable
class Indexed(Protocol):
    """What has a length, and any of its items on request."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: int, /) -> Any: ...


def turns(items: Iterable[T], first: int = 0) -> Iterator[T | None]:
    """Yield this rank's item of each round, from round `first` on, in which each rank has one.

    None where the last round has none left for it. What has no length is gone through whole.
    """
    rank, count = _here.rank, _here.count
    if isinstance(items, Indexed):
        for start in range(first * count, len(items), count):
            yield items[start + rank] if start + rank < len(items) else None
        return
    own: list[T] = []
    seen = 0
    for item in items:
        if seen % count == rank and seen >= first * count:
            own.append(item)
        del item  # before the next one is made
        seen += 1
        if seen % count == 0 and seen > first * count:
            yield own.pop()
    if seen % count:
        yield own.pop() if own else None


def swap(rows: Tensor) -> Tensor:
    """Give row i of [count w] to the i-th rank, and return the rows that came, in their order."""
    if _here.count == 1:
        return rows
    came = torch.empty_like(rows)
    dist.all_to_all_single(came, rows)
    return came


def join(part: Tensor) -> Tensor:
    """Return the parts [w] of all ranks one after the other, [count * w]."""
    if _here.count == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(_here.count)]
    dist.all_gather(parts, part)
    return torch.cat(parts)


def mean(values: Tensor) -> Tensor:
    """Return the mean of the ranks' values, the same bits on each."""
    if _here.count == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / _here.count


def parallel(network: nn.Module) -> nn.Module:
    """Return the network such that a backward leaves the ranks' mean gradients.

    Batch norm takes its statistics over a rank's own images; `level` evens out those it keeps.
    """
    if _here.count == 1:
        return network
    known = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"  # as torch calls it since 2.14
    how: dict[str, Any] = {new if new in known else old: False}
    return DistributedDataParallel(network, **how)


def level(network: nn.Module) -> None:
    """Give all ranks the mean of what their networks keep, such as running statistics."""
    with torch.no_grad():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.copy_(mean(buffer))
