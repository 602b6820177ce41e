"""The report: one HTML page of a whole workspace that opens from disk, on a phone too."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from dop_fast import __version__, disk, masks
from dop_fast.errors import DataError
from dop_fast.images import ImageSet, open_images
from dop_fast.masks import MaskSet
from dop_fast.report import facts, gallery, layers, plots, reliability, table, ways
from dop_fast.runs import Run, finished_runs
from dop_fast.stores import PatchStore, exists
from dop_fast.types import Track, untracked
from dop_fast.workspace import Workspace

__all__ = ["build", "write"]


def write(workspace: Workspace, track: Track = untracked) -> Path:
    """Write the page of all that a workspace holds to `workspace.report`, and return its path.

    Where the images are gone, the page is made without their pictures.
    """
    store = PatchStore(workspace.patches) if exists(workspace.patches) else None
    found = {path.stem: masks.load(path) for path in sorted(workspace.masks.glob("*.safetensors"))}
    try:
        train, _ = open_images(workspace.data, workspace.root, workspace.seed)
    except DataError:
        train = None
    page = build(workspace, store, train, finished_runs(workspace.runs), found, track=track)
    with (
        disk.replacing(workspace.report, 0) as partial,
        partial.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):  # errors: a name of bytes that are no text
        file.writelines(page)
    return workspace.report


def build(
    workspace: Workspace,
    store: PatchStore | None,
    train: ImageSet | None,
    runs: Sequence[Run],
    kept: Mapping[str, MaskSet],
    *,
    track: Track = untracked,
) -> Iterator[str]:
    """Return the page as HTML, in pieces: a thousand classes' pictures are never all in memory.

    What was not made yet is said with the command that makes it.

    `runs` are finished ones, `kept` are masks by name. The concepts' pictures come from `train`;
    they are left out where it is None or not the images that `store` was extracted from.
    """
    made = ways.of_masks(kept)
    named = ways.of_runs(runs, made)
    results = [table.result(run, named[run.name]) for run in runs]
    studies = reliability.studies(workspace.sanity)
    scored = [curve.name for study in studies for curve in study.rows]
    look = plots.styles_of_ways([*named.values(), *made.values(), *scored])
    known = store.header if store else train
    classes = known.classes if known else ()
    same = store is not None and train is not None and train.fingerprint == store.header.data
    masked = [layers.card(name, mask, made[name]) for name, mask in kept.items()]
    cards = gallery.classes(store, train if same else None, track) if store else ()
    settings = facts.settings(workspace, facts.used(store, runs, kept))
    content = {
        "title": _title(workspace),
        "overview": facts.overview(workspace, store, train, results),
        "settings": settings,
        "unlike": facts.unlike(settings),
        "steps": facts.steps(store, results, kept),
        "made_by": facts,
        "made": facts.made(runs),
        "inputs": facts.inputs(store, train),
        "version": __version__,
        "results": results,
        "unfinished": facts.unfinished(workspace, runs),
        "store": store,
        "pictures": same,
        "classes": classes,
        "cards": cards,
        "stitching": gallery.stitching(store, track) if store else None,
        "look": look,
        "colours": {ways.key(way): css for way, css in look.items()},
        "studies": studies,
        "counts": reliability.COUNTS,
        "curves": plots.curves(results, look),
        "masks": masked,
        "effective": layers.effective(masked),
        "densities": plots.densities(kept, made, look),
        "overlaps": table.overlaps(kept, made),
        **_compared(results, look),
    }
    return _environment().get_template("report.html").generate(content)


def _compared(results: Sequence[table.Result], look: plots.Styles) -> dict[str, Any]:
    comparison = table.compare(results)
    several = len(comparison.sparsities) > 1
    return {
        "comparison": comparison,
        "repeated": any(cell.n > 1 for cell in comparison.cells),
        "strips": plots.strips(comparison),
        "accuracy": plots.accuracy(comparison, look) if several else [],
    }


def _title(workspace: Workspace) -> str:
    data = Path(workspace.data.path).stem
    return f"{workspace.model.name} on {data}" if data else workspace.model.name


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dop_fast"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(p_text=gallery.p_text, duration=facts.duration, way_key=ways.key)
    return environment
