"""`dopfast train`: a dense teacher."""

from dop_fast.cli._click import Call, Outcome, command, settings
from dop_fast.cli._progress import track
from dop_fast.cli._recipe import recipe
from dop_fast.config import TrainConfig


@command("dopfast train --epochs 30 --lr 0.05", ranks="all")
@recipe
@settings(TrainConfig)
def train(call: Call, config: TrainConfig) -> Outcome:
    """Train the teacher whose concepts are extracted."""
    from dop_fast import pipeline
    from dop_fast.cli._epochs import best, follow, left_out

    result = follow(pipeline.train(call.workspace, config, call.seed,
                                   pipeline.device_of(call.device), force=call.afresh,
                                   sources=call.sources, track=track), config.epochs)  # fmt: skip
    return Outcome(
        result=result,
        lines=(f"teacher: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, {best(result)}",),
        read=(call.workspace.data.path,),
        wrote=(str(call.workspace.teacher_weights),),
        warnings=left_out(result),
        next="dopfast extract",
    )
