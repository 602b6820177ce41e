"""`dopfast init`: make a workspace."""

from pathlib import Path
from typing import Any

import click

from dop_fast.cli._click import Option, Outcome, command
from dop_fast.cli._failures import ENVIRONMENT
from dop_fast.cli._progress import without_bars


@command(
    "dopfast init --data photos/ --teacher resnet18 --size 128", workspace=False, compute=False
)
@click.option(
    "--data",
    required=True,
    cls=Option,
    panel="Data",
    metavar="DIR|ZIP|NAME",
    help="folder of classes (or train/ and val/), a zip of one, or a torchvision data set",
)
@click.option(
    "--size",
    type=int,
    default=0,
    cls=Option,
    panel="Data",
    help="images enter as size x size pixels  [default: theirs up to 64, else 224]",
)
@click.option(
    "--teacher",
    default="",
    cls=Option,
    panel="Networks",
    metavar="NAME|FILE|NAME=FILE",
    help="trained classifier; a NAME alone is trained by `dopfast train`, "
    "NAME=DEFAULT takes torchvision's weights  [default: resnet18, or resnet20 to 64 px]",
)
@click.option(
    "--model",
    default="",
    cls=Option,
    panel="Networks",
    metavar="NAME",
    help="network to prune  [default: the teacher's architecture]",
)
@click.option(
    "-w",
    "--workspace",
    type=click.Path(path_type=Path),
    default=".",
    show_default=True,
    envvar=f"{ENVIRONMENT}_WORKSPACE",
    cls=Option,
    panel="Workspace",
    help="folder to make it in",
)
def init(workspace: Path, **values: Any) -> Outcome:
    """Make a workspace for a set of images.

    The images are counted, and dopfast.toml is written with every key explained.
    """
    from dop_fast import pipeline
    from dop_fast.concepts import FEWEST_IMAGES

    if not Path(values["data"]).expanduser().exists() or "=" in values["teacher"]:
        without_bars()  # what is downloaded shows its own
    made, train, val = pipeline.init(workspace, **values)
    names = ", ".join(train.classes[:8]) + (", ..." if len(train.classes) > 8 else "")
    lines = (
        f"{len(train.classes)} classes: {names}",
        f"{len(train)} training and {len(val)} validation images at {train.size} px",
        f"teacher {made.teacher.name}, model {made.model.name}",
    )
    few = pipeline.small_classes(train)
    return Outcome(
        result={"classes": train.classes, "train": len(train), "val": len(val), "size": train.size},
        lines=lines,
        read=(made.data.path,),
        wrote=(str(workspace / "dopfast.toml"),),
        warnings=tuple(
            f"class {name} has {count} training images, extraction needs {FEWEST_IMAGES}"
            for name, count in few.items()
        ),
        next="dopfast extract" if made.teacher.weights else "dopfast train",
    )  # fmt: skip
