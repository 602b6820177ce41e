"""Sweeps: criteria, materials, sparsities and seeds, compared on one workspace in one go."""

import io
import json
from pathlib import Path

from dop_fast import disk
from dop_fast.sweep import plots, tables
from dop_fast.sweep.definition import Grid, Sweep, find, load, ready
from dop_fast.sweep.results import Results, collect
from dop_fast.sweep.running import Book, run

__all__ = ["Book", "Grid", "Results", "Sweep", "collect", "find", "load", "ready", "run", "write"]


def write(book: Book) -> tuple[Results, tuple[Path, ...]]:
    """Write the tables, and the plots as soon as a run is done; return them and their paths."""
    results = collect(book)
    book.folder.mkdir(parents=True, exist_ok=True)
    files = {
        "table.md": tables.as_markdown(results).encode(),
        "table.csv": tables.as_csv(results).encode(),
        "table.json": json.dumps(tables.as_json(results), indent=2).encode() + b"\n",
    }
    comparison = results.comparison
    if comparison.rows:
        drawn, image = plots.draw(comparison)
        pixels = io.BytesIO()
        image.save(pixels, "PNG")
        files |= {"accuracy.svg": drawn.encode(), "accuracy.png": pixels.getvalue()}
    for name, content in files.items():
        disk.write(book.folder / name, content)
    return results, tuple(book.folder / name for name in sorted(files))
