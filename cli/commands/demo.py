"""`dopfast demo`: the whole job on embedded data."""

from pathlib import Path

import click

from dop_fast.cli._click import Option, Outcome, command, table
from dop_fast.cli._progress import track


@command("dopfast demo", workspace=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="dopfast-demo",
    show_default=True,
    cls=Option,
    panel="Output",
    help="folder to work in",
)
def demo(output: Path, seed: int, device: str, force: bool) -> Outcome:
    """Run the whole job on drawn images of known truth.

    Nothing is downloaded; it takes a few minutes on a CPU.
    """
    from dop_fast import pipeline, showcase
    from dop_fast.cli._epochs import follow

    made = follow(showcase.run(output, seed, pipeline.device_of(device), force=force, track=track))
    rows = [(name, f"{found['top1']:.1%}") for name, found in made.masks.items()]
    precision = made.precision
    return Outcome(
        result=made.to_dict(),
        lines=(
            *table(("mask", "top-1"), [("teacher (dense)", f"{made.teacher['top1']:.1%}"), *rows]),
            "",
            "pixels that lie on the objects: "
            f"{precision.concepts:.1%} of the concepts', {precision.random:.1%} of all segments'",
        ),
        wrote=(str(made.page),),
        next=f"open {made.page}; your own images: dopfast init --data DIR -w WORKSPACE",
    )  # fmt: skip
