"""A sweep's results as Markdown, CSV and JSON."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from dop_fast.report.table import CONFIDENCE, Estimate
from dop_fast.sweep import statistics
from dop_fast.sweep.anchors import Anchor, of_set
from dop_fast.sweep.cells import DENSE, Row
from dop_fast.sweep.results import Results

SCHEMA, VERSION = "dopfast.sweep", 1
NONE = "-"


def entries(results: Results) -> Iterator[dict[str, Any]]:
    """Yield one flat record for each row and sparsity that has any run, dense first.

    Accuracies are in percent and differences in points; None where there is no such figure.
    """
    dense = statistics.over_seeds(results.dense)
    if dense:
        about = {"row": DENSE, "criterion": "", "variant": "", "material": "", "settings": {}}
        yield {**about, "sparsity": 0.0, **_figures("", dense), **_no_differences()}
    for row, name in results.names.items():
        for at, figures in sorted(results.top1.get(row, {}).items()):
            base = results.baseline(row, at)
            against = results.top1[base][at] if base else {}
            found = statistics.over_seeds(figures)
            assert found is not None  # a row has a sparsity from its first run on
            yield {
                "row": name,
                "criterion": row.criterion,
                "variant": row.variant,
                "material": row.material,
                "settings": row.settings,
                "sparsity": at,
                **_figures("", found),
                "baseline": results.names[base] if base else "",
                **_figures("baseline_difference_", statistics.paired(figures, against)),
                **_figures("dense_difference_", statistics.paired(figures, results.dense)),
            }


def _figures(lead: str, found: Estimate | None) -> dict[str, Any]:
    low, high = (found.interval if found else None) or (None, None)
    deviation = statistics.deviation(found) if found else math.nan
    return {
        f"{lead}n": found.n if found else 0,
        f"{lead}mean": _percent(found.mean if found else None),
        f"{lead}sd": None if math.isnan(deviation) else _percent(deviation),
        f"{lead}low": _percent(low),
        f"{lead}high": _percent(high),
    }


def _no_differences() -> dict[str, Any]:
    return {
        "baseline": "",
        **_figures("baseline_difference_", None),
        **_figures("dense_difference_", None),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 6)


def as_json(results: Results) -> dict[str, Any]:
    """Return everything as JSON values: records, every seed's figure, and published anchors."""
    per_seed = {
        name: {f"{at:g}": dict(figures) for at, figures in results.top1.get(row, {}).items()}
        for row, name in results.names.items()
    }
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "sweep": results.sweep.name,
        "cells": results.cells,
        "done": results.done,
        "confidence": CONFIDENCE,
        "recipe": dict(results.recipe),
        "entries": list(entries(results)),
        "top1": {DENSE: dict(results.dense), **per_seed},
        "anchors": [
            {
                "name": anchor.name,
                "criterion": anchor.criterion,
                "material": anchor.material,
                "top1": {f"{at:g}": value for at, value in anchor.top1.items()},
                "source": anchor.source,
                "recipe": dict(anchor.recipe),
                "differs": anchor.differences(ours),
                "unknown": anchor.unknown(ours),
            }
            for anchor, ours in _anchors(results)
        ],
    }


def as_csv(results: Results) -> str:
    """Return the records as CSV, one line each."""
    rows = list(entries(results))
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            settings = " ".join(f"{key}={value}" for key, value in row["settings"].items())
            writer.writerow({**row, "settings": settings})
    return text.getvalue()


def as_markdown(results: Results) -> str:
    """Return a table of top-1 with published figures, one of paired differences, and notes."""
    recipe = results.recipe
    lines = [
        f"# {results.sweep.name}: {recipe['model']}, {recipe['classes']} classes",
        "",
        f"{results.done} of {results.cells} cells are done. Top-1 in percent: mean ± standard "
        f"deviation [{100 * CONFIDENCE:g} % interval, Student's t] (seeds); "
        "one seed has none.",
        "",
        *_table(["", *(f"{100 * at:.4g} %" for at in results.sparsities)], _accuracies(results)),
    ]
    differences = list(_differences(results))
    if differences:
        lines += [
            "",
            "## Paired differences",
            "",
            "In points, seed by seed, to the row named: positive where the row is better. An "
            "interval that holds 0 shows no difference.",
            "",
            *_table(["", "held against", *(f"{100 * at:.4g} %" for at in results.sparsities)],
                    differences),
        ]  # fmt: skip
    notes = list(_notes(results))
    if notes:
        lines += [
            "",
            "## Published figures",
            "",
            "≠: the recipe differs from ours; ?: what is known of it does not, but not all is.",
            "",
            *notes,
        ]
    return "\n".join(lines) + "\n"


def text(found: Estimate | None, sign: str = "") -> str:
    """Write an estimate of shares in percent, with an interval from two seeds on."""
    if found is None:
        return NONE
    mean = f"{100 * found.mean:{sign}.2f}"
    if not found.interval:
        return f"{mean} ({found.n})"
    low, high = (f"{100 * end:{sign}.2f}" for end in found.interval)
    return f"{mean} ± {100 * statistics.deviation(found):.2f} [{low}, {high}] ({found.n})"


def _accuracies(results: Results) -> Iterator[list[str]]:
    """Yield our rows, and after each the published ones that are like it."""
    published = _anchors(results)
    if results.dense:
        dense = text(statistics.over_seeds(results.dense))
        yield [f"{DENSE}, 0 %", dense, *[""] * (len(results.sparsities) - 1)]
    shown: set[int] = set()
    for row, name in results.names.items():
        figures = results.top1.get(row, {})
        yield [
            name,
            *(text(statistics.over_seeds(figures.get(at, {}))) for at in results.sparsities),
        ]
        for i, (anchor, _) in enumerate(published):
            if i not in shown and _like(anchor, row):
                shown.add(i)
                yield _published(i, published, results.sparsities)
    for i in range(len(published)):
        if i not in shown:
            yield _published(i, published, results.sparsities)


def _published(
    i: int, published: Sequence[tuple[Anchor, dict[str, Any]]], sparsities: Sequence[float]
) -> list[str]:
    anchor, ours = published[i]
    figures = (f"{anchor.top1[at]:.2f}" if at in anchor.top1 else NONE for at in sparsities)
    return [f"*published: {anchor.name}* {_mark(anchor, ours)} ({i + 1})", *figures]


def _mark(anchor: Anchor, ours: dict[str, Any]) -> str:
    return "≠" if anchor.differences(ours) else "?" if anchor.unknown(ours) else "="


def _notes(results: Results) -> Iterator[str]:
    for i, (anchor, ours) in enumerate(_anchors(results), start=1):
        differs, unknown = anchor.differences(ours), anchor.unknown(ours)
        yield (
            f"{i}. {anchor.name}: {anchor.source}. Recipe: {anchor.told()}."
            + (f" Differs: {'; '.join(differs)}." if differs else "")
            + (f" Unknown: {', '.join(unknown)}." if unknown else "")
        )


def _anchors(results: Results) -> list[tuple[Anchor, dict[str, Any]]]:
    """Return the anchors, each with the recipe of our row that is like it, or of all rows."""
    return [
        (
            anchor,
            results.recipe_of(next((row for row in results.names if _like(anchor, row)), None)),
        )
        for anchor in of_set(results.sweep.anchors)
        if set(anchor.top1) & set(results.sparsities)
    ]


def _like(anchor: Anchor, row: Row) -> bool:
    same = (anchor.criterion, anchor.material) == (row.criterion, row.material)
    return same and (anchor.sigma is None or not row.stitch or anchor.sigma == row.stitch.sigma)


def _differences(results: Results) -> Iterator[list[str]]:
    for row, name in results.names.items():
        cells, against = [], ""
        for at in results.sparsities:
            base = results.baseline(row, at) if at in results.top1.get(row, {}) else None
            if base is None:
                cells.append(NONE)
                continue
            against = results.names[base]
            ours, theirs = results.top1[row][at], results.top1[base][at]
            cells.append(text(statistics.paired(ours, theirs), "+"))
        if against:
            yield [name, against, *cells]


def _table(header: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> list[str]:
    aligned = [":--", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows)]
