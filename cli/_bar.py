"""Progress on a terminal; apart from the other plumbing, since it loads rich."""

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

T = TypeVar("T")


class Count(ProgressColumn):
    """How many are done of how many; nothing where neither is known."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        if task.total is not None:
            return Text(f"{task.completed:,.0f}/{task.total:,.0f}")
        return Text(f"{task.completed:,.0f}" if task.completed else "")


class Rate(ProgressColumn):
    """How many in a second, or how long each takes where that is more than one."""

    def render(self, task: Task) -> Text:
        """Return the text; nothing before the first item is done."""
        each = _each_s(task)
        if not each:
            return Text("")
        return Text(f"{1 / each:,.1f}/s" if each <= 1 else f"{each:,.1f} s each")


class Time(ProgressColumn):
    """The time left, or where that cannot be known, the time it has taken."""

    def render(self, task: Task) -> Text:
        """Return the text."""
        if task.remaining is None:
            return Text(_clock(int(task.elapsed or 0)))
        each = _each_s(task)
        if not each:
            return Text("")
        begun_s = min(task.get_time() - task.fields["ends"][-1], each)
        return Text(f"{_clock(max(0, math.ceil(task.remaining * each - begun_s)))} left")


class Bars(Progress):
    """Bars on stderr that vanish: one for each `over`, and while there is none, a waiting one."""

    def __init__(self, waiting: str) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),  # names may hold brackets
            BarColumn(), Count(), Rate(), Time(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._waiting = self.add_task(waiting, total=None, ends=[])

    def over(
        self, items: Iterable[T], label: str | Callable[[T], str], total: int | None
    ) -> Iterator[T]:
        """Pass items on behind a bar of their own; a label may be made from each item."""
        ends: list[float] = []  # when the first item was done, and the last one
        self.update(self._waiting, visible=False)
        task = self.add_task(label if isinstance(label, str) else "", total=total, ends=ends)
        try:
            for item in items:
                if not isinstance(label, str):
                    self.update(task, description=label(item))
                yield item
                ends[1:] = [self.get_time()]
                self.advance(task)
        finally:
            self.remove_task(task)
            self.update(self._waiting, visible=len(self.tasks) == 1)


def _each_s(task: Task) -> float:
    """Return how long an item takes; 0 before one is done.

    The first one, which may have to warm up, counts as long as it is the only one, and the one
    that is being worked on once it takes longer than those before.
    """
    done, ends, now = int(task.completed), task.fields["ends"], task.get_time()
    if not done:
        return 0.0
    first, last = ends[0], ends[-1]
    before = (last - first) / (done - 1) if done > 1 else first - (task.start_time or 0)
    return float(max(before, (now - first) / done))


def _clock(time_s: int) -> str:
    return str(timedelta(seconds=time_s))
