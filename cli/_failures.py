"""How a command line fails: a message, the next step and an exit code, or one JSON object."""

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import click

from dop_fast.cli import _ranks
from dop_fast.errors import ConfigError, DopFastError

INTERRUPTED = 130
ENVIRONMENT = "DOPFAST"
"""What the names of variables begin with; then come the command and the option."""


@contextmanager
def failures(argv: list[str]) -> Iterator[None]:
    """Turn known failures into a message, a hint and an exit code; leave bugs their traceback."""
    try:
        yield
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        said = str(error.__cause__ or error)  # Click's Abort is caused by the interruption
        _fail(argv, "interrupted", said or "interrupted; what is finished is kept",
              "run the same command again to go on")  # fmt: skip
        sys.exit(INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        named = [word for word in argv[:1] if not word.startswith("-")]
        hint = f"{ctx.command_path if ctx else ' '.join(['dopfast', *named])} --help"
        _fail(argv, "usage", error.format_message(), hint)
        sys.exit(error.exit_code)
    except DopFastError as error:
        _fail(argv, type(error).__name__, error.message, error.hint)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(argv, "file", "the disk is full",
                  "make room and run the same command again: what is finished is kept")  # fmt: skip
        elif error.filename is None:  # not about a file: a bug
            raise
        else:
            _fail(argv, "file", f"{error.strerror}: {error.filename}",
                  "check the path and its permissions, then run it again")  # fmt: skip
        sys.exit(1)


def there(text: str, folder: str) -> str:
    """Return a text whose commands work in that workspace, if one is named."""
    if folder in ("", "."):
        return text
    option = f" -w {shlex.quote(folder)}"
    command = r"\bdopfast (?!demo|doctor)[a-z]+(?! --help)\b"
    return re.sub(command, lambda found: found[0] + option, text)


def _named_workspace(argv: list[str]) -> str:
    """Return the workspace that a command line names, which may not be one that can be read."""
    for option, value in pairwise(argv):
        if option in ("-w", "--workspace"):
            return value
    return ""


def _asks_json(argv: list[str]) -> bool:
    """Return whether JSON is asked for, of a command line that may not be one."""
    name = f"{ENVIRONMENT}_{argv[0].upper()}_JSON" if argv else ""
    return "--json" in argv or bool(click.BOOL.str_to_bool(os.environ.get(name, "")))


def _fail(argv: list[str], kind: str, message: str, hint: str) -> None:
    if not _ranks.tells_failure():
        return
    hint = there(hint, _named_workspace(argv))
    if _asks_json(argv):
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "hint": hint}}))
        return
    click.echo(style("error: ", fg="red", bold=True) + plain(message), err=True)
    if hint:
        click.echo(f"\nhint: {plain(hint)}", err=True)


def plain(text: str) -> str:
    """Return a text with control characters escaped: names of files may hold what terminals obey.

    So are bytes of a name that are no text, which cannot be printed.
    """
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )


def style(text: str, **look: Any) -> str:
    """Return a text in colour, unless NO_COLOR asks for none; Click leaves it out where piped."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **look)
