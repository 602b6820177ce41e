"""How a long job is followed on the terminal: lines on stderr, the result at the end."""

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from dop_fast.training import Epoch

T = TypeVar("T")


def follow(steps: "Generator[str | Epoch, None, T]", total: int = 0) -> T:
    """Print every step on stderr, with the time left of `total` epochs, and return the result."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        click.echo(step if isinstance(step, str) else _line(step, total), err=True)


def _line(epoch: "Epoch", total: int) -> str:
    left = (total - epoch.epoch) * epoch.time_s / 60
    return (
        f"  epoch {epoch.epoch:>3}  lr {epoch.lr:<8.2g} loss {epoch.train_loss:<7.3f} "
        f"top-1 {epoch.top1:<7.2%} {epoch.images_per_s:,.0f} images/s"
        + (f"  {left:.0f} min left" if total else "")
    )
