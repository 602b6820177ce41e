"""How far a command is, on stderr: bars on a terminal, and with --verbose a line for each step."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import click

from dop_fast.cli import _ranks
from dop_fast.cli._failures import plain

if TYPE_CHECKING:
    from dop_fast.cli._bar import Bars

T = TypeVar("T")

BARS, BEGAN = "dopfast.bars", "dopfast.began"
"""Keys of `Context.meta`: what draws bars, and when a command began that logs its steps."""


@contextmanager
def progress(ctx: click.Context, *, quiet: bool, verbose: bool) -> Iterator[None]:
    """Show how far the command is; with --quiet, and on all ranks but the first, do not."""
    if quiet or not _ranks.first():
        yield
        return
    if verbose:
        ctx.meta[BEGAN] = time.perf_counter()
    if not sys.stderr.isatty():
        yield
    else:
        from dop_fast.cli._bar import Bars

        with Bars(ctx.info_name or "") as ctx.meta[BARS]:
            yield
    log("done")


def without_bars() -> None:
    """Draw no more bars: something else draws its own."""
    if bars := click.get_current_context().meta.pop(BARS, None):
        bars.stop()


def track(items: Iterable[T], label: str | Callable[[T], str], total: int | None) -> Iterator[T]:
    """Pass `items` on, and show which of them is being worked on."""
    bars: Bars | None = click.get_current_context().meta.get(BARS)

    def text(item: T) -> str:
        return label if isinstance(label, str) else plain(label(item))

    if bars is not None:
        items = bars.over(items, label if isinstance(label, str) else text, total)
    last = ""
    for item in items:
        if text(item) != last:
            log(last := text(item))
        yield item


def log(text: str) -> None:
    """Write a line, where --verbose asks for it, with the seconds since the command began."""
    if began := click.get_current_context().meta.get(BEGAN):
        click.echo(f"{time.perf_counter() - began:9.1f} s  {text}", err=True)
