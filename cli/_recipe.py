"""`--recipe`: named settings, above the defaults and below dopfast.toml."""

from typing import Any

import click

from dop_fast import recipes
from dop_fast.cli._click import SOURCES, Body, Option, Outcome


def recipe(body: Body) -> Body:
    """Give a command --recipe; it stands above `settings`, so that it is looked at first."""

    def wrapped(recipe: str, **values: Any) -> Outcome:
        return body(**values)  # the settings that it says have come as every other default

    wrapped.__name__, wrapped.__doc__ = body.__name__, body.__doc__
    wrapped.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(body, "__click_params__", []),
        Option(
            ["--recipe"], default="", callback=_start_from, panel="Schedule",
            shell_complete=_beginning,
            help=f"published settings to start from: {', '.join(recipes.names())}",
        ),
    ]  # fmt: skip
    return wrapped


def _beginning(ctx: click.Context, param: click.Parameter, text: str) -> list[str]:
    return [name for name in recipes.names() if name.startswith(text)]


def _start_from(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value and not ctx.resilient_parsing:
        given, found = ctx.default_map or {}, recipes.read(value)
        ctx.default_map = {**found, **given}
        ctx.meta[SOURCES] = dict.fromkeys(found.keys() - given.keys(), f"recipe {value}")
    return value
