"""How a training is followed on the terminal."""

import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dop_fast.training import Epoch


def follow(epochs: "Generator[Epoch, None, dict[str, Any]]", total: int) -> dict[str, Any]:
    """Print a line for each epoch on stderr and return the run's result."""
    while True:
        try:
            record = next(epochs)
        except StopIteration as end:
            result: dict[str, Any] = end.value
            return result
        left = (total - record.epoch) * record.time_s
        click.secho(
            f"epoch {record.epoch:>3}/{total}  loss {record.train_loss:.3f}  "
            f"top-1 {record.top1:.2%}  {record.images_per_s:,.0f} images/s  "
            f"{left / 60:.0f} min left",
            err=True,
            dim=not sys.stderr.isatty(),
        )
