"""How a long job is followed on the terminal: lines on stderr, the result at the end."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dop_fast.training import Epoch

T = TypeVar("T")


def told(steps: Generator[str, None, T]) -> T:
    """Print every line on stderr and return what the job returns."""
    while True:
        try:
            click.echo(next(steps), err=True)
        except StopIteration as end:
            result: T = end.value
            return result


def follow(epochs: "Generator[Epoch, None, dict[str, Any]]", total: int) -> dict[str, Any]:
    """Print a line for each epoch on stderr and return the training's result."""

    def lines() -> Generator[str, None, dict[str, Any]]:
        while True:
            try:
                epoch = next(epochs)
            except StopIteration as end:
                result: dict[str, Any] = end.value
                return result
            minutes = (total - epoch.epoch) * epoch.time_s / 60
            yield (
                f"epoch {epoch.epoch:>3}/{total}  lr {epoch.lr:.2g}  loss {epoch.train_loss:.3f}  "
                f"top-1 {epoch.top1:.2%}  {epoch.images_per_s:,.0f} images/s  "
                f"{minutes:.0f} min left"
            )

    return told(lines())
