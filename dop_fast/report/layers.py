"""What a mask leaves of each layer of a network, before and after."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dop_fast.masks import LayerMask, MaskSet
from dop_fast.report.table import Estimate, estimate, sparsity


class LayerRow(NamedTuple):
    """A layer before and after: its weights, and its share of all that there are and stay.

    `alive`: kept weights on a path from input to output; None where that is not known.
    """

    layer: LayerMask
    before: float
    after: float
    alive: int | None


class MaskCard(NamedTuple):
    """A mask in numbers; None where they were not recorded when it was made.

    `sparsity` is of the prunable weights, `overall` of all parameters; `effective` sparsity counts
    weights on no path as removed too, see `reach`.
    """

    name: str
    way: str
    asked: float
    kept: int
    total: int
    sparsity: float
    overall: float | None
    effective: float | None
    rows: list[LayerRow]


def card(name: str, mask: MaskSet, way: str) -> MaskCard:
    """Return a mask in numbers."""
    layers = mask.layers()
    total, kept = sum(row.total for row in layers), sum(row.kept for row in layers)
    alive: Mapping[str, Any] = mask.about.get("on_path") or {}
    rows = [
        LayerRow(row, row.total / total, row.kept / kept if kept else 0.0, alive.get(row.name))
        for row in layers
    ]
    effective = 1 - sum(alive.values()) / total if alive else None
    parameters = mask.about.get("parameters")
    overall = (total - kept) / parameters if parameters else None
    return MaskCard(
        name, way, sparsity(mask), kept, total, 1 - kept / total, overall, effective, rows
    )


class Effective(NamedTuple):
    """Effective sparsity by way of pruning (rows) and sparsity asked (columns), over seeds."""

    sparsities: list[float]
    rows: dict[str, dict[float, Estimate]]

    @property
    def repeated(self) -> bool:
        """Whether any figure rests on more than one seed."""
        return any(cell.n > 1 for row in self.rows.values() for cell in row.values())


def effective(cards: Sequence[MaskCard]) -> Effective:
    """Gather the masks' effective sparsity, as far as it was recorded."""
    found: dict[str, dict[float, list[float]]] = {}
    for one in sorted(cards, key=lambda one: (one.way, one.asked)):
        if one.effective is not None:
            found.setdefault(one.way, {}).setdefault(one.asked, []).append(one.effective)
    rows = {way: {at: estimate(values) for at, values in row.items()} for way, row in found.items()}
    return Effective(sorted({at for row in rows.values() for at in row}), rows)
