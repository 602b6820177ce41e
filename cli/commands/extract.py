"""`dopfast extract`: the concepts of every class."""

from typing import Any

from dop_fast.cli._click import Call, Outcome, command, settings, table
from dop_fast.cli._progress import track
from dop_fast.config import ExtractConfig


@command("dopfast extract --images 50 --clusters 25", ranks="all")
@settings(ExtractConfig)
def extract(call: Call, config: ExtractConfig) -> Outcome:
    """Find what the teacher looks at: concepts, ranked by TCAV.

    ACE for each class: SLIC segments, clusters of their activations, separators from random
    segments. Goes on where it stopped.
    """
    from dop_fast import pipeline

    device = pipeline.device_of(call.device)
    store = pipeline.extract(
        call.workspace, config, call.seed, device, force=call.force, track=track
    )
    rows, weak = pipeline.concept_table(store, config.alpha)
    columns = ("class", "segments", "concepts", "best TCAV", "p")
    return Outcome(
        result={"classes": rows, "layer": store.header.layer},
        lines=table(columns, map(_row, rows)),
        read=(call.workspace.data.path, f"teacher, layer {store.header.layer}"),
        wrote=(str(store.path),),
        warnings=tuple(f"no significant concept in class {name}" for name in weak),
        next="dopfast stitch --sigma 0.75",
    )


def _row(found: dict[str, Any]) -> tuple[object, ...]:
    *counts, best, p = found.values()
    if best is None:
        return *counts, "-", "-"
    return *counts, f"{best:.3f}", "< 0.001" if p < 0.001 else f"{p:.3f}"
