"""How a long job is followed on the terminal: lines on stderr, the result at the end."""

import math
from collections.abc import Generator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dop_fast.cli._failures import plain
from dop_fast.cli._ranks import first

if TYPE_CHECKING:
    from dop_fast.training import Epoch

T = TypeVar("T")
NAMED = 5  # images that a warning names before it counts the rest


def follow(steps: "Generator[str | Epoch, None, T]", total: int = 0) -> T:
    """Print every step on stderr, with the time left of `total` epochs, and return the result.

    With --quiet nothing is printed. KeyboardInterrupt says how many epochs are kept.
    """
    quiet, done = click.get_current_context().params.get("quiet"), 0
    try:
        while True:
            step = next(steps)
            done = 0 if isinstance(step, str) else step.epoch
            if first() and not quiet:
                click.echo(plain(step) if isinstance(step, str) else _line(step, total), err=True)
    except StopIteration as end:
        result: T = end.value
        return result
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_interrupted(done, total)) from error
    finally:
        steps.close()  # an interrupted job gives back what it claimed


def left_out(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a warning that names the images which a training could not read, if there are any."""
    names = result["unreadable"]
    if not names:
        return ()
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    named = f"{', '.join(names[:NAMED])}{more}"
    return (f"images that cannot be read were left out, {len(names)} in all: {named}",)


def best(result: Mapping[str, Any]) -> str:
    """Return which epoch was the best."""
    return f"best {result['best_top1']:.2%} after epoch {result['best_epoch']}"


def _interrupted(done: int, total: int) -> str:
    kept = "interrupted; what is finished is kept"
    return f"{kept}: {done} of {total} epochs" if total else kept


def _line(epoch: "Epoch", total: int) -> str:
    left_s = math.ceil(max(0, total - epoch.epoch) * epoch.time_s)
    return (
        f"  epoch {epoch.epoch:>3}  lr {epoch.lr:<8.2g} loss {epoch.train_loss:<7.3f} "
        f"top-1 {epoch.top1:<7.2%} {epoch.images_per_s:,.0f} images/s"
        + (f"  average {epoch.ema_top1:.2%}" if epoch.ema_top1 is not None else "")
        + (f"  {timedelta(seconds=left_s)} left" if left_s else "")
    )
