"""`dopfast sweep`: criteria, materials, sparsities and seeds, compared in one go."""

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from dop_fast.cli._click import Call, Option, Outcome, command, table
from dop_fast.cli._progress import track

if TYPE_CHECKING:
    from dop_fast.sweep import Book


@command("dopfast sweep cifar10-table1.toml", preview=True, ranks="none")
@click.argument("file")
@click.option("--model", default="", cls=Option, panel="Input",
              help="network to prune  [default: the file's, else the workspace's]")  # fmt: skip
def sweep(call: Call, file: str, model: str, dry_run: bool) -> Outcome:
    """Compare criteria, materials and sparsities over seeds.

    FILE is a sweep file, or the name of one that comes with dopfast. Finished cells are skipped.
    Start it on any number of machines that share the workspace: each takes the next free cell.
    """
    from dop_fast import pipeline
    from dop_fast.cli._epochs import follow
    from dop_fast.errors import DopFastError
    from dop_fast.sweep import Book, find, load, run, tables, write

    path = find(file)
    asked = load(path, call.seed)
    if call.sources.get("seed") == "flag" and call.seed not in asked.seeds:
        raise click.UsageError(f"{file} lists its seeds, so --seed has no effect")
    if model:
        own = f"{asked.name}-{model.replace(':', '-')}"  # tables of its own
        asked = replace(asked, model=model, name=own)
    book = Book(asked, call.workspace)
    if dry_run:
        return _preview(book)
    steps = run(book, pipeline.device_of(call.device), force=call.force,
                after_cell=lambda: write(book), track=track)  # fmt: skip
    done_here = follow(steps, book.sweep.finetune.epochs)
    results, wrote = write(book)
    states = {cell.run: book.state(cell) for cell in book.cells}
    failed = {name: state for name, state in states.items() if state.startswith("failed")}
    if failed:
        name, why = next(iter(failed.items()))
        raise DopFastError(
            f"{len(failed)} of {len(states)} cells failed, such as {name}: {why}",
            f"mend it and run the same command again; the others stand in {wrote[-1].parent}",
        )
    left = [f"{name}: {state}" for name, state in states.items() if state != "done"]
    return Outcome(
        result={**tables.as_json(results), "done_here": done_here, "states": states},
        lines=tuple(tables.as_markdown(results).splitlines()),
        read=(str(path), call.workspace.data.path),
        wrote=tuple(map(str, wrote)),
        warnings=(f"{len(left)} cells are not done: {left[0]}",) if left else (),
        next="dopfast sweep again, when those are done" if left else "dopfast report",
    )


def _preview(book: "Book") -> Outcome:
    cells = [(cell.run, cell.sparsity, cell.seed, book.state(cell)) for cell in book.cells]
    done = sum(state == "done" for *_, state in cells)
    keys = ("run", "sparsity", "seed", "state")
    return Outcome(
        result={"cells": [dict(zip(keys, row, strict=True)) for row in cells], "done": done},
        lines=(*table(keys, cells), "", f"{done} of {len(cells)} cells are done"),
        next=f"dopfast sweep without --dry-run: {len(cells) - done} trainings of "
        f"{book.sweep.finetune.epochs} epochs",
    )
