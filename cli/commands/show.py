"""`dopfast show`: contact sheets for a terminal person."""

from pathlib import Path

import click

from dop_fast.cli._click import Call, Choice, Option, Outcome, command

SHEETS = ("concepts", "stitched", "segments")


@command("dopfast show concepts --class tulips -o tulips.png", compute=False, without=("seed",))
@click.argument("what", type=Choice(SHEETS))
@click.option(
    "--class", "name", default="", cls=Option, panel="Data", help="class  [default: the first]"
)
@click.option(
    "--image",
    type=int,
    default=0,
    show_default=True,
    cls=Option,
    panel="Data",
    help="segments: number of the image among its class's training images",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    cls=Option,
    panel="Output",
    help="PNG to write  [default: WHAT-CLASS.png in the workspace]",
)
def show(call: Call, what: str, name: str, image: int, output: Path | None) -> Outcome:
    """Write a PNG of concepts, stitched patches or segments."""
    from dop_fast import disk
    from dop_fast.report import sheets

    path = output or call.workspace.root / f"{'-'.join(filter(None, (what, name)))}.png"
    sheet = sheets.show(call.workspace, what, name, image)
    with disk.replacing(path, 0) as partial:
        sheet.save(partial, "PNG")
        if output and not call.force:
            disk.refuse_other(path, partial)
    return Outcome(result={"sheet": path}, lines=(str(path),), wrote=(str(path),))  # fmt: skip
