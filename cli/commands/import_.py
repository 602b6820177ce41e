"""`dopfast import`: masks that other programs made."""

from pathlib import Path

import click

from dop_fast.cli._click import Call, Option, Outcome, command


@command("dopfast import mask.pth --name theirs", compute=False)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", default="", cls=Option, panel="Output",
              help="the mask's name  [default: the file's]")  # fmt: skip
def import_(call: Call, file: Path, name: str) -> Outcome:
    """Take a mask of the workspace's model from a file.

    Of any kind that `dopfast export` writes, or a state dict: NAME_mask of zeros and ones, or
    masks or weights by name, of which those that are zero are removed. Pickles are refused.
    """
    from dop_fast import pipeline

    path, kept, model = pipeline.import_mask(
        call.workspace, file, name, call.seed, force=call.force
    )
    return Outcome(
        result={
            **kept.about, "kept": kept.kept, "total": kept.total,
            "sparsity_prunable": kept.sparsity,
            "sparsity_overall": kept.overall_sparsity(model),
        },
        lines=(
            f"{kept.kept} of {kept.total} prunable weights kept",
            f"sparsity {kept.sparsity:.4%} of prunable weights, "
            f"{kept.overall_sparsity(model):.4%} of all parameters",
        ),
        read=(str(file),),
        wrote=(str(path),),
        next=f"dopfast finetune --mask {path.stem}",
    )  # fmt: skip
