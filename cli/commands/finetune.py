"""`dopfast finetune`: train the sparse network."""

import click

from dop_fast.cli._click import Call, Option, Outcome, command, completes, settings
from dop_fast.cli._progress import track
from dop_fast.cli._recipe import recipe
from dop_fast.config import TrainConfig


@command("dopfast finetune --mask grasp-stitched-0.95-s0 --epochs 120", ranks="all")
@recipe
@settings(TrainConfig)
@click.option("--mask", default="", cls=Option, panel="Input", help="mask  [default: the newest]",
              shell_complete=completes("masks"))  # fmt: skip
@click.option("--dense", is_flag=True, cls=Option, panel="Input", help="no mask: the baseline")
@click.option("--name", default="", cls=Option, panel="Output",
              help="the run's name  [default: the mask's]")  # fmt: skip
def finetune(call: Call, config: TrainConfig, mask: str, dense: bool, name: str) -> Outcome:
    """Train the pruned network with its mask held.

    The paper's recipe or another, scaled to the epochs asked for; goes on where it stopped.
    """
    from dop_fast import pipeline
    from dop_fast.cli._epochs import best, follow, left_out

    if dense and mask:
        raise click.UsageError("--dense takes no --mask")
    chosen = None if dense else pipeline.open_mask(call.workspace, mask)
    folder = pipeline.run_folder(call.workspace, chosen[0] if chosen else "", name, call.seed)
    epochs = pipeline.finetune(call.workspace, config, chosen, folder, call.seed,
                               pipeline.device_of(call.device), force=call.afresh,
                               sources=call.sources, track=track)  # fmt: skip
    result = follow(epochs, config.epochs)
    return Outcome(
        result={**result, "run": folder.name},
        lines=(
            f"{folder.name}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
            f"{best(result)}",
        ),
        read=(call.workspace.data.path, *([f"mask {chosen[0]}"] if chosen else [])),
        wrote=(str(folder),),
        warnings=left_out(result),
        next="dopfast report",
    )
