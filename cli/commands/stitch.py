"""`dopfast stitch`: Super Stitching."""

from dop_fast.cli._click import Call, Outcome, command, settings, table
from dop_fast.cli._progress import track
from dop_fast.config import StitchConfig


@command("dopfast stitch --sigma 0.75 --per-class 10", compute=False)
@settings(StitchConfig)
def stitch(call: Call, config: StitchConfig) -> Outcome:
    """Stitch concepts into patches that cover more than sigma.

    Super Stitching, the paper's Algorithm 2: segments keep their place, important ones on top.
    """
    from dop_fast import pipeline

    made = pipeline.stitch(call.workspace, config, call.seed, force=call.force, track=track)
    rows = [
        (name, config.per_class, f"{share:.3f}", made.short.get(name, 0))
        for name, share in made.coverage.items()
    ]
    seen = " ".join(f"{share:.3f}" for share in made.visible)
    return Outcome(
        result={"coverage": made.coverage, "short": made.short, "visible": made.visible},
        lines=(
            *table(("class", "patches", "coverage", "below sigma"), rows),
            f"share of a patch that shows each concept, most important first: {seen}",
        ),
        read=(str(made.store.path),),
        wrote=(f"{made.store.path}/stitched",),
        warnings=tuple(
            f"{count} of {config.per_class} patches of {name} do not reach sigma {config.sigma:g}: "
            "its segments cover too little"
            for name, count in made.short.items()
        ),
        next="dopfast prune --criterion grasp",
    )
