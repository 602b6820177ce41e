"""Several pieces of work at once, each computed as by a single thread.

PyTorch cuts its sums among its threads, so that results depend on how many there are. Within
`single` it has one, and `spread` gives the others whole pieces.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, local
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_width = ContextVar("_width", default=1)
_piece = local()
"""In a thread of `spread`, `over`: nobody waits for its work any more."""


class Abandoned(Exception):
    """A piece of work that nobody waits for."""


@contextmanager
def single() -> Iterator[None]:
    """Let PyTorch compute on one thread; `spread` has as many as it had before."""
    count = torch.get_num_threads()
    token = _width.set(max(count, width()))
    torch.set_num_threads(1)  # in this thread, and in those that begin from now on
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _width.reset(token)


def width() -> int:
    """Return over how many threads `spread` goes."""
    return _width.get()


def spread(
    work: Callable[[T], R], items: Iterable[T], most: Callable[[], int] = width
) -> Iterator[R]:
    """Yield what `work` returns for each item, in their order, within `single`.

    The calling thread takes the items, one ahead. `most`, which is asked when one is at work, says
    how many may be at once.
    """
    if width() == 1:
        yield from map(work, items)
        return
    pool, over = ThreadPoolExecutor(width(), "spread"), Event()
    pending: deque[Future[R]] = deque()

    def run(item: T) -> R:
        _piece.over = over
        return work(item)

    try:
        for item in items:
            while pending and len(pending) >= most():
                yield pending.popleft().result()
            pending.append(pool.submit(run, item))
            del item  # before the next one is made
        while pending:
            yield pending.popleft().result()
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


def go_on() -> None:
    """Raise `Abandoned` in a piece of work that is over; long ones call it at every step.

    So that after an error, or Ctrl-C, there is no waiting for the rest of the others.
    """
    over = getattr(_piece, "over", None)
    if over is not None and over.is_set():
        raise Abandoned
