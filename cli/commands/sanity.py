"""`dopfast sanity`: controls of masks, and how much of them is signal."""

import click

from dop_fast.cli._click import Call, Option, Outcome, command, settings, table
from dop_fast.cli._progress import track
from dop_fast.config import SanityConfig


@command("dopfast sanity --criterion grasp --sparsity 0.95 --budget 1600")
@settings(SanityConfig)
@click.option("--finetune", is_flag=True, cls=Option, panel="Output",
              help="train every control too, as [finetune] in dopfast.toml says")  # fmt: skip
def sanity(call: Call, config: SanityConfig, finetune: bool) -> Outcome:
    """Check how much of a mask is signal.

    Compares the scores of two halves of the material that share no photograph, and masks with
    their controls: other items, weights or labels, shuffled, random. Goes on where it stopped.
    """
    from dop_fast import pipeline
    from dop_fast import sanity as checks
    from dop_fast.cli._epochs import follow
    from dop_fast.report import reliability

    device = pipeline.device_of(call.device)
    study = checks.open_study(call.workspace, config, call.seed, device)
    with study.alone():
        short = checks.measure(study, force=call.force, track=track)
        checks.compare(study, force=call.force, track=track)
        if finetune:
            follow(checks.train(study, force=call.force, track=track))
    content = checks.read(study.path)
    curves = reliability.curves(content)
    found = (
        reliability.reliability_table(curves),
        reliability.control_table(content),
        reliability.material_table(content),
    )
    return Outcome(
        result={**content, "needed": {curve.name: curve.needed.to_dict() for curve in curves}},
        lines=tuple(line for part in found if part.rows for line in (*table(*part), ""))[:-1],
        read=(call.workspace.data.path, *([str(study.store.path)] if study.store else [])),
        wrote=(str(study.path),),
        warnings=tuple(short),
        next="dopfast report",
    )
