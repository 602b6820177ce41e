"""`dopfast`: the group of commands, in the order of the pipeline."""

import importlib
import keyword
import sys
import warnings

import click

from dop_fast import __version__
from dop_fast.cli._click import Helped
from dop_fast.cli._failures import ENVIRONMENT, failures

COMMANDS = (
    "init", "train", "extract", "stitch", "prune", "finetune", "sweep", "sanity", "report", "show",
    "export", "import", "demo", "verify", "doctor",
)  # fmt: skip


class Pipeline(Helped, click.Group):
    """Lists the commands in pipeline order and imports the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in pipeline order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; its function carries its module's name.

        Of a word of Python's own, such as import, both have a `_` behind it.
        """
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:
                return None
            raise click.exceptions.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        home = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        module = importlib.import_module(f"dop_fast.cli.commands.{home}")
        found: click.Command = getattr(module, home)
        return found


@click.group(
    cls=Pipeline,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": ENVIRONMENT},
)
@click.version_option(__version__, prog_name="dopfast", help="show the version, then stop")
def dopfast() -> None:
    """One-shot pruning at initialisation on discriminative image patches.

    A first run, with nothing to download:  dopfast demo

    Your own images:  dopfast init --data DIR, then train, extract, stitch, prune, finetune, report.
    """


def main() -> None:
    """Run the command line; every known failure ends in a message and a hint."""
    argv = sys.argv[1:]
    warnings.filterwarnings("ignore", r"Image size \(")  # PIL's: such an image is refused by name
    with failures(argv):
        dopfast.main(argv, prog_name="dopfast", standalone_mode=False)
