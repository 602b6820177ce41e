"""Split-half reliability: whether other items of the same kind give the same masks.

A cell is one criterion, material, number of items and split. It scores the first half, the
second, and the first again in other chunks, of which batch norm takes its statistics. A cell's
items are among the next larger one's, so that the cells of a split differ in the number alone.

Every cell is scored from the start, exactly as `prune` would, by whatever criterion: since sizes
double, sums shared between them would save at most half (SNIP), and GraSP's product Hg needs the
gradient g of all items of a cell anyway.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
from torch import nn

from dop_fast.errors import ConfigError, DataError
from dop_fast.patches.material import Material, gather
from dop_fast.sanity.agreement import agreement
from dop_fast.sanity.halves import Half, halve
from dop_fast.sanity.study import Results, Study
from dop_fast.seeding import derive, stream
from dop_fast.settings import fingerprint
from dop_fast.types import Track, untracked


@dataclass(frozen=True)
class Cell:
    """Both halves have `per_class` items of each class."""

    criterion: str
    material: str
    per_class: int
    split: int

    def key(self, classes: int) -> str:
        """Return its key in the results."""
        return f"{self.criterion}/{self.material}/{self.per_class * classes}/{self.split}"


def ladder(start: int, budget: int, classes: int) -> tuple[int, ...]:
    """Return the items of each class in a half: about start / classes, doubled up to the budget.

    ConfigError where the budget does not hold two halves of the first.
    """
    sizes = [max(1, round(start / classes))]
    while 4 * sizes[-1] * classes <= budget:
        sizes.append(2 * sizes[-1])
    least = 2 * sizes[0] * classes
    if least > budget:
        raise ConfigError(
            f"a budget of {budget} items is too small: two halves of {sizes[0]} items of each of "
            f"{classes} classes are {least}",
            f"dopfast sanity --budget {least} or more, or a smaller --start",
        )
    return tuple(sizes)


def measure(study: Study, *, force: bool = False, track: Track = untracked) -> list[str]:
    """Measure what is not in the file of results yet; return where and why material ran out."""
    config, classes = study.config, len(study.train.classes)
    sizes = ladder(config.start, config.budget, classes)
    results = Results(study, force=force)
    of = {kind: fingerprint(study.source(kind), "halves 1") for kind in study.materials}
    todo = [
        cell
        for cell in _cells(study, sizes)
        if not results.done("reliability", cell.key(classes), of[cell.material])
    ]
    model = study.model(study.seed)
    ends: dict[tuple[str, int], tuple[int, str]] = {}

    @lru_cache(1)  # cells come split by split
    def halves(split: int) -> tuple[Half, Half]:
        seed = derive(study.seed, "split", split)
        return halve(study.train, study.store, seed, stitched=sizes[-1])

    for cell in track(todo, lambda cell: f"scoring halves: {cell.key(classes)}", len(todo)):
        way = cell.material, cell.split
        if way in ends and cell.per_class >= ends[way][0]:
            continue
        try:
            first, second = (_gather(study, cell, half) for half in halves(cell.split))
        except DataError as error:
            if cell.per_class == sizes[0]:
                raise DataError(
                    f"half of the photographs is not enough: {error.message}",
                    f"start smaller: dopfast sanity --start {max(2, config.start // 2)}, "
                    f"or leave out {cell.material}",
                ) from error
            ends[way] = cell.per_class, error.message
            continue
        row = _measured(study, cell, model, (first, second))
        results.put("reliability", cell.key(classes), {**row, "of": of[cell.material]})
    return [
        f"{kind} ran out below {per_class * classes} items a half in split {split}: {why}"
        for (kind, split), (per_class, why) in ends.items()
    ]


def _cells(study: Study, sizes: tuple[int, ...]) -> Iterator[Cell]:
    """Yield split by split, smaller ones first: an interrupted study has whole curves."""
    for split in range(study.config.splits):
        for per_class in sizes:
            for material in study.materials:
                for criterion in dict.fromkeys(study.config.criterion):
                    yield Cell(criterion, material, per_class, split)


def _gather(study: Study, cell: Cell, half: Half) -> Material:
    found = gather(
        cell.material, half.store, half.images, study.workspace.data,
        study.prune_config(cell.per_class), seed=derive(study.seed, "items", cell.split),
        device=study.device,
    )  # fmt: skip
    if found.repeated:  # would make the halves look alike
        raise DataError(found.repeated, "lower --budget")
    return found


def _measured(
    study: Study, cell: Cell, model: nn.Module, halves: tuple[Material, Material]
) -> dict[str, object]:
    began = time.perf_counter()
    sparsity = study.config.sparsity
    first, second = (study.score(cell.criterion, model, half) for half in halves)
    row: dict[str, object] = {
        **asdict(cell),
        "items": cell.per_class * len(study.train.classes),
        "chunks": len(halves[0].chunks),
        "halves": asdict(agreement(first, second, sparsity)),
        "regrouped": None,
    }
    if len(halves[0].chunks) > 1:
        again = regrouped(halves[0], derive(study.seed, "regroup", cell.split))
        scores = study.score(cell.criterion, model, again)
        row["regrouped"] = asdict(agreement(first, scores, sparsity))
    return {**row, "time_s": round(time.perf_counter() - began, 3)}


def regrouped(material: Material, seed: int) -> Material:
    """Return the same items in as many other chunks."""
    order = stream(seed, "chunks").permutation(np.concatenate(material.chunks))
    return replace(material, chunks=tuple(np.array_split(order, len(material.chunks))))
