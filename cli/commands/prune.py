"""`dopfast prune`: one-shot pruning at initialisation."""

import click

from dop_fast import criteria
from dop_fast.cli._click import Call, Option, Outcome, command, settings, table, track
from dop_fast.config import PruneConfig


@command("dopfast prune --criterion grasp --sparsity 0.95 --material stitched")
@settings(PruneConfig, criterion=criteria.names())
@click.option("--name", default="", cls=Option, panel="Output",
              help="the mask's name  [default: criterion-material-sparsity-seed]")  # fmt: skip
def prune(call: Call, config: PruneConfig, name: str) -> Outcome:
    """Score weights at initialisation; keep the top share.

    The mask keeps exactly round(N * (1 - sparsity)) of the N conv and linear weights. Criteria of
    several rounds go on where they were interrupted.
    """
    from dop_fast import pipeline

    path, kept, model = pipeline.prune(
        call.workspace, config, call.seed, pipeline.device_of(call.device),
        name=name, force=call.force, track=track,
    )  # fmt: skip
    variant = " as published" if config.variant == "published" else ""
    overall = kept.overall_sparsity(model)
    layers = [
        (row.name, "x".join(map(str, row.shape)), row.kept, row.total, f"{row.density:.4f}")
        for row in kept.layers()
    ]
    empty = [row.name for row in kept.layers() if row.kept == 0]
    return Outcome(
        result={**kept.about, "kept": kept.kept, "total": kept.total,
                "sparsity_prunable": kept.sparsity, "sparsity_overall": overall},
        lines=(
            *table(("layer", "shape", "kept", "of", "density"), layers),
            "",
            f"{kept.kept} of {kept.total} prunable weights kept",
            f"sparsity {kept.sparsity:.4%} of prunable weights, "
            f"{overall:.4%} of all parameters (the paper's)",
            f"criterion {kept.about['criterion']}{variant}, material {kept.about['material']}, "
            f"rounds {kept.about['rounds']}",
        ),
        read=(
            call.workspace.data.path,
            *([str(call.workspace.patches)] if kept.about.get("patches") else []),
        ),
        wrote=(str(path),),
        warnings=tuple(f"layer {layer} lost every weight: nothing passes it" for layer in empty),
        next=f"dopfast finetune --mask {path.stem}",
    )  # fmt: skip
