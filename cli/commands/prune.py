"""`dopfast prune`: one-shot pruning at initialisation."""

from typing import TYPE_CHECKING, Any

import click

from dop_fast import criteria
from dop_fast.cli._click import Call, Option, Outcome, command, settings, table, track
from dop_fast.config import PruneConfig
from dop_fast.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from dop_fast.masks import MaskSet
    from dop_fast.reach import Reach

NAMED = 5  # layers that a warning names before it counts the rest


@command("dopfast prune --criterion grasp --sparsity 0.95 --material stitched", ranks="all")
@settings(PruneConfig, criterion=criteria.names())
@click.option("--name", default="", cls=Option, panel="Output",
              help="the mask's name  [default: criterion-material-sparsity-seed]")  # fmt: skip
def prune(call: Call, config: PruneConfig, name: str) -> Outcome:
    """Score weights at initialisation; keep the top share.

    The mask keeps exactly round(N * (1 - sparsity)) of the N conv and linear weights. Criteria of
    several rounds go on where they were interrupted.
    """
    from dop_fast import pipeline, reach

    path, kept, model = pipeline.prune(
        call.workspace, config, call.seed, pipeline.device_of(call.device),
        name=name, force=call.force, track=track,
    )  # fmt: skip
    size, found = call.workspace.data.size, None
    unknown: tuple[str, ...] = ()
    try:
        found = reach.follow(model, kept, (3, size, size))
    except ModelError as error:  # the mask is made: it is only not known what it leaves
        unknown = (f"effective sparsity is unknown: {error.message}",)
    return Outcome(
        result={**kept.about, **_facts(kept, model, found)},
        lines=(*_layers(kept, found), "", *_totals(kept, model, found)),
        read=(
            call.workspace.data.path,
            *([str(call.workspace.patches)] if kept.about.get("patches") else []),
        ),
        wrote=(str(path),),
        warnings=(*kept.about.get("notes", ()), *unknown, *_warnings(kept, found)),
        next=f"dopfast finetune --mask {path.stem}",
    )  # fmt: skip


def _facts(kept: "MaskSet", model: "nn.Module", found: "Reach | None") -> dict[str, Any]:
    layers = {
        row.name: {"shape": row.shape, "kept": row.kept, "total": row.total}
        for row in kept.layers()
    }
    facts = {
        "kept": kept.kept, "total": kept.total, "sparsity_prunable": kept.sparsity,
        "sparsity_overall": kept.overall_sparsity(model), "layers": layers,
    }  # fmt: skip
    if found is None:
        return facts
    for row in found.alive.layers():
        layers[row.name]["alive"] = row.kept
    return facts | {
        "alive": found.alive.kept, "effective_sparsity_prunable": found.alive.sparsity,
        "effective_sparsity_overall": found.alive.overall_sparsity(model),
        "collapsed": found.collapsed, "cut": found.cut, "dead_layers": found.dead,
        "outputs": found.outputs, "outputs_reached": found.reached, "guessed": found.guessed,
    }  # fmt: skip


def _layers(kept: "MaskSet", found: "Reach | None") -> tuple[str, ...]:
    alive = [str(row.kept) for row in found.alive.layers()] if found else ["?"] * len(kept.masks)
    rows = [
        (row.name, "x".join(map(str, row.shape)), row.kept, row.total, f"{row.density:.4f}", left)
        for row, left in zip(kept.layers(), alive, strict=True)
    ]
    return table(("layer", "shape", "kept", "of", "density", "alive"), rows)


def _totals(kept: "MaskSet", model: "nn.Module", found: "Reach | None") -> tuple[str, ...]:
    lines = [
        f"{kept.kept} of {kept.total} prunable weights kept",
        f"sparsity {kept.sparsity:.4%} of prunable weights, "
        f"{kept.overall_sparsity(model):.4%} of all parameters (the paper's)",
    ]
    if found:
        lines.append(
            f"effective sparsity {found.alive.sparsity:.4%}, "
            f"{found.alive.overall_sparsity(model):.4%}: {found.alive.kept} weights lie on a path "
            "from input to output"
        )
    about = kept.about
    variant = " as published" if about["settings"]["variant"] == "published" else ""
    return (
        *lines,
        f"criterion {about['criterion']}{variant}, material {about['material']}, "
        f"rounds {about['rounds']}",
    )


def _warnings(kept: "MaskSet", found: "Reach | None") -> tuple[str, ...]:
    if found is None:
        empty = [row.name for row in kept.layers() if not row.kept]
        return (f"all weights removed of {_named(empty)}",) if empty else ()
    if found.collapsed:
        where = f": every path ends at {_named(found.cut)}" if found.cut else ""
        return (f"layer collapse: the output does not depend on the input any more{where}; "
                "keep some of every layer: --min-layer-density 0.001",)  # fmt: skip
    warnings = []
    if found.dead:
        warnings.append(f"no path leads through {_named(found.dead)}: shortcuts pass them by")
    if found.reached < found.outputs:
        lost = found.outputs - found.reached
        warnings.append(f"no path leads to {lost} of the {found.outputs} outputs (classes)")
    if found.guessed:
        warnings.append(
            f"dead weights may hide behind {_named(found.guessed)}: taken to pass everything on"
        )
    return tuple(warnings)


def _named(names: "tuple[str, ...] | list[str]") -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
