"""`dopfast prune`: one-shot pruning at initialisation."""

from typing import TYPE_CHECKING, Any

import click

from dop_fast import criteria
from dop_fast.cli._click import Call, Option, Outcome, command, settings, table
from dop_fast.cli._progress import track
from dop_fast.config import PruneConfig

if TYPE_CHECKING:
    from dop_fast.masks import MaskSet

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
    from dop_fast import pipeline

    path, kept, model = pipeline.prune(
        call.workspace, config, call.seed, pipeline.device_of(call.device),
        name=name, force=call.force, track=track,
    )  # fmt: skip
    overall = kept.overall_sparsity(model)
    return Outcome(
        result={**kept.about, **_facts(kept, overall)},
        lines=(*_layers(kept), "", *_totals(kept, overall)),
        read=(
            call.workspace.data.path,
            *([str(call.workspace.patches)] if kept.about.get("patches") else []),
        ),
        wrote=(str(path),),
        warnings=(*kept.about.get("notes", ()), *_warnings(kept)),
        next=f"dopfast finetune --mask {path.stem}",
    )  # fmt: skip


def _facts(kept: "MaskSet", overall: float) -> dict[str, Any]:
    alive, paths = kept.about["on_path"], kept.about["paths"]
    layers = {
        row.name: {"shape": row.shape, "kept": row.kept, "total": row.total}
        | ({"alive": alive[row.name]} if alive else {})
        for row in kept.layers()
    }
    facts = {
        "kept": kept.kept, "total": kept.total, "sparsity_prunable": kept.sparsity,
        "sparsity_overall": overall, "layers": layers,
    }  # fmt: skip
    if "unknown" in paths:
        return facts
    left = sum(alive.values())
    return facts | {
        "alive": left, "effective_sparsity_prunable": 1 - left / kept.total,
        "effective_sparsity_overall": (kept.total - left) / kept.about["parameters"],
        "collapsed": not paths["reached"], "dead_layers": _dead(kept), "cut": paths["cut"],
        "outputs": paths["outputs"], "outputs_reached": paths["reached"],
        "guessed": paths["guessed"],
    }  # fmt: skip


def _dead(kept: "MaskSet") -> list[str]:
    return [name for name, count in kept.about["on_path"].items() if not count]


def _layers(kept: "MaskSet") -> tuple[str, ...]:
    rows = [
        (row.name, "x".join(map(str, row.shape)), row.kept, row.total, f"{row.density:.4f}",
         kept.about["on_path"].get(row.name, "?"))
        for row in kept.layers()
    ]  # fmt: skip
    return table(("layer", "shape", "kept", "of", "density", "alive"), rows)


def _totals(kept: "MaskSet", overall: float) -> tuple[str, ...]:
    about = kept.about
    lines = [
        f"{kept.kept} of {kept.total} prunable weights kept",
        f"sparsity {kept.sparsity:.4%} of prunable weights, "
        f"{overall:.4%} of all parameters (the paper's)",
    ]
    if about["on_path"]:
        left = sum(about["on_path"].values())
        lines.append(
            f"effective sparsity {1 - left / kept.total:.4%}, "
            f"{(kept.total - left) / about['parameters']:.4%}: {left} weights lie on a path "
            "from input to output"
        )
    variant = " as published" if about["settings"]["variant"] == "published" else ""
    return (
        *lines,
        f"criterion {about['criterion']}{variant}, material {about['material']}, "
        f"rounds {about['rounds']}",
    )


def _warnings(kept: "MaskSet") -> tuple[str, ...]:
    paths = kept.about["paths"]
    if "unknown" in paths:
        empty = [row.name for row in kept.layers() if not row.kept]
        removed = (f"all weights removed of {_named(empty)}",) if empty else ()
        return (f"effective sparsity is unknown: {paths['unknown']}", *removed)
    if not paths["reached"]:
        where = f": every path ends at {_named(paths['cut'])}" if paths["cut"] else ""
        return (f"layer collapse: the output does not depend on the input any more{where}; "
                "keep some of every layer: --min-layer-density 0.001",)  # fmt: skip
    warnings = []
    if dead := _dead(kept):
        warnings.append(f"no path leads through {_named(dead)}: shortcuts pass them by")
    if paths["reached"] < paths["outputs"]:
        lost = paths["outputs"] - paths["reached"]
        warnings.append(f"no path leads to {lost} of the {paths['outputs']} outputs (classes)")
    if paths["guessed"]:
        warnings.append(
            f"dead weights may hide behind {_named(paths['guessed'])}: taken to pass everything on"
        )
    return tuple(warnings)


def _named(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
