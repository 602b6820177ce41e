"""Doing the cells of a sweep: the next free one, until all are done or somebody else's."""

import shutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from dop_fast import masks, models, pipeline, pruning, runs, stores
from dop_fast.claims import Claim, Claims
from dop_fast.config import ModelConfig
from dop_fast.errors import DopFastError, StoreError
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.runs import WITHOUT_EFFECT
from dop_fast.settings import fingerprint, is_remote
from dop_fast.stores import PatchStore
from dop_fast.sweep.cells import Cell, Row, cells
from dop_fast.sweep.definition import Sweep
from dop_fast.training import Epoch
from dop_fast.types import Track, untracked
from dop_fast.workspace import Workspace

Steps = Generator[str | Epoch, None, tuple[str, ...]]
"""Yields what begins and every epoch; returns the names of the runs that were done here."""


@dataclass(frozen=True)
class Book:
    """A sweep in its workspace: its cells, and how far each of them is."""

    sweep: Sweep
    space: Workspace

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell, in the order in which they are done."""
        return cells(self.sweep, self.space)

    @cached_property
    def claims(self) -> Claims:
        """Claims on the cells of all sweeps of this workspace."""
        return Claims(self.space.sweeps / "claims")

    @property
    def folder(self) -> Path:
        """Where the tables and plots go."""
        return self.space.sweeps / self.sweep.name

    @cached_property
    def train(self) -> ImageSet:
        """The training images; DataError where there are none."""
        return pipeline.open_data(self.space)[0]

    def workspace(self, row: Row | None) -> Workspace:
        """Return the workspace as a row sees it: its model, and the store of its patches."""
        model = ModelConfig(self.sweep.model) if self.sweep.model else self.space.model
        space = replace(self.space, model=model)
        if row is None or row.stitch is None:
            return space
        source = vars(self.store(None).header) if stores.exists(self.space.patches) else None
        mark = fingerprint(row.stitch.to_dict(), self.space.seed, source)
        return replace(space, store=f"{space.sweeps.name}/stitched-{mark[:8]}.zarr")

    def origin(self, cell: Cell) -> Cell:
        """Return the cell whose mask a control's is like; of any other cell, itself."""
        return next((other for other in self.cells if other.mask == cell.like != ""), cell)

    def lacks(self, cell: Cell) -> str:
        """Return the key of what must be made first: patches to stitch, or the mask it is like."""
        if cell.like:
            origin = self.origin(cell)
            return "" if self.mask(origin).is_file() else self.lacks(origin) or origin.key
        if cell.row is None or cell.row.stitch is None:
            return ""
        store = self.workspace(cell.row).patches
        return "" if stores.exists(store) else Path(store).stem

    def run(self, cell: Cell) -> runs.Run | None:
        """Return the finished run of a cell; None before."""
        folder = self.space.runs / cell.run
        if not (folder / runs.MANIFEST).is_file():
            return None
        found = runs.read(folder)
        return found if found.finished else None

    def state(self, cell: Cell) -> str:
        """Say how far it is: done, running (by whom), failed (why), begun, pruned or free."""
        if self.run(cell):
            return "done"
        holder = self.claims.holder(cell.key)
        if holder:
            return f"running: {holder}"
        failure = self.claims.failure(cell.key, since_start=False)
        if failure:
            return f"failed: {failure}"
        if (self.space.runs / cell.run / runs.MANIFEST).is_file():
            return "begun"
        return "pruned" if cell.mask and self.mask(cell).is_file() else "free"

    def outdated(self) -> dict[str, str]:
        """Return finished runs that are not what would be made today, and in what."""
        return {
            cell.run: differs
            for cell in self.cells
            if (done := self.run(cell)) and (differs := self._difference(cell, done))
        }

    def mask(self, cell: Cell) -> Path:
        """Return where the mask of a pruned cell is."""
        return self.space.mask(cell.mask)

    def _difference(self, cell: Cell, done: runs.Run) -> str:
        if done.about.facts.get("data") != self.train.fingerprint:
            return "the images"
        asked, was = self.sweep.finetune.to_dict(), done.about.settings
        changed = [key for key in asked.keys() & was.keys() if asked[key] != was[key]]
        if set(changed) - WITHOUT_EFFECT:
            return f"settings: {', '.join(sorted(changed))}"
        if not cell.mask or not self.mask(cell).is_file():
            return ""
        made_on = masks.load(self.mask(cell)).about.get("patches", "")
        if made_on and made_on not in self._patches(cell):
            return "the store of patches"
        return ""

    def store(self, row: Row | None) -> PatchStore:
        """Return the store of patches that a row is scored on; StoreError where there is none."""
        return PatchStore(self.workspace(row).patches)

    def _patches(self, cell: Cell) -> tuple[str, ...]:
        """Return the marks that `pipeline.prune` leaves of a store, with and without stitching."""
        if not stores.exists(self.workspace(cell.row).patches):
            return ()
        store = self.store(cell.row)
        return tuple(fingerprint(vars(store.header), part) for part in (None, store.stitching))


def run(
    book: Book,
    device: torch.device,
    *,
    force: bool = False,
    after_cell: Callable[[], object] = lambda: None,
    track: Track = untracked,
) -> Steps:
    """Do every cell that is free, one after the other; `after_cell` follows each.

    Any number of processes may do this at a time. A cell that fails with a known error is noted
    and left, by the others too; the next start tries it again. Raises ConfigError and ModelError
    where a row cannot prune the network, before it does any; StoreError where finished
    runs are of other images or patches; `force` makes those and all others anew.
    """
    _check(book)
    if force:
        _clear(book)
    elif old := book.outdated():
        name, differs = next(iter(old.items()))
        raise StoreError(
            f"{len(old)} finished runs differ in {differs} from what this sweep would make, "
            f"such as {name}",
            "make all runs of this sweep anew: dopfast sweep ... --force",
        )
    _ = book.claims.began  # failures of before are tried again
    done_here: list[str] = []
    while taken := _next(book):
        cell, claim = taken
        with claim:
            try:
                if claim.key != cell.key:
                    yield from _prepare(book, book.origin(cell), device, track)
                    continue
                place = 1 + sum(book.run(other) is not None for other in book.cells)
                yield f"{place} of {len(book.cells)}: {cell.run}"
                finished = yield from _do(book, cell, claim, device, track)
            except DopFastError as error:
                book.claims.fail(claim.key, f"{error.message}; {error.hint}")
                yield f"failed: {error.message}"
                continue
        if finished:
            done_here.append(cell.run)
            after_cell()
    for claims in (book.claims, Claims(book.space.claims)):
        claims.tidy()  # a process that was killed after its last cell comes back to none
    return tuple(done_here)


def _check(book: Book) -> None:
    """Raise ConfigError or ModelError where the network cannot be pruned by one of the rows."""
    space, size = book.workspace(None), book.space.data.size
    model = models.build(space.model.name, len(book.train.classes), space.seed, space.root)
    for row, sparsity in {(cell.row, cell.sparsity): None for cell in book.cells}:
        if row:
            pruning.plan(row.pruning(sparsity), model, (3, size, size))


def _next(book: Book) -> tuple[Cell, Claim] | None:
    """Claim the first cell that nobody has, has done, or has failed at since we began.

    Where its patches must be stitched, or the mask it is like made first, that is what is claimed.
    """
    for cell in book.cells:
        key = book.lacks(cell) or cell.key
        if book.run(cell) or book.claims.failure(key):
            continue
        claim = book.claims.take(key)
        if claim is None:
            continue
        if not book.run(cell) and key == (book.lacks(cell) or cell.key):
            book.claims.forget_failure(key)
            return cell, claim
        with claim:  # done by another process between the look and the claim
            pass
    return None


def _clear(book: Book) -> None:
    """Remove the masks and runs of every cell; StoreError, and none, where one is worked on."""
    taken: list[Claim] = []
    try:
        for cell in book.cells:
            claim = book.claims.take(cell.key)
            if claim is None:
                raise StoreError(
                    f"{cell.run} is being done by {book.claims.holder(cell.key)}",
                    "end that process first",
                )
            taken.append(claim)
        for cell in book.cells:
            shutil.rmtree(book.space.runs / cell.run, ignore_errors=True)
            if cell.mask:
                book.mask(cell).unlink(missing_ok=True)
    finally:
        for claim in taken:
            with claim:  # given back
                pass


def _do(
    book: Book, cell: Cell, claim: Claim, device: torch.device, track: Track
) -> Generator[str | Epoch, None, bool]:
    """Prune and train one cell; return False where it was taken over by another process."""
    space = book.workspace(cell.row)
    mask = (cell.mask, _prune(book, cell, device, track)) if cell.row else None
    folder = pipeline.run_folder(space, cell.mask, cell.run, cell.seed)
    epochs = pipeline.finetune(
        space, book.sweep.finetune, mask, folder, cell.seed, device, track=track,
        sources=dict.fromkeys(book.sweep.finetune.to_dict(), f"sweep {book.sweep.name}"),
    )  # fmt: skip
    for epoch in epochs:
        if not claim.held:
            yield "taken over by another process: this one gave no sign of life for too long"
            return False
        yield epoch
    return True


def _prune(book: Book, cell: Cell, device: torch.device, track: Track) -> MaskSet:
    assert cell.row is not None  # dense has no mask
    config = replace(cell.row.pruning(cell.sparsity), like=cell.like)
    space = book.workspace(cell.row)
    return pipeline.prune(space, config, cell.seed, device, name=cell.mask, track=track)[1]


def _prepare(
    book: Book, cell: Cell, device: torch.device, track: Track
) -> Generator[str, None, None]:
    """Make what others need of a cell: its stitched patches, and if they are there, its mask."""
    if book.lacks(cell):
        yield from _stitch(book, cell.row, track)
    else:
        yield f"prune: {cell.mask}"
        _prune(book, cell, device, track)


def _stitch(book: Book, row: Row | None, track: Track) -> Generator[str, None, None]:
    """Make a row's own stitched patches, in a copy of the store."""
    assert row is not None and row.stitch is not None  # else it lacks nothing
    source, space = book.space.patches, book.workspace(row)
    if is_remote(source):
        raise StoreError(
            f"{source} is not a folder, so no other patches can be stitched beside it",
            "leave [stitch] out of the sweep file, and run: dopfast stitch",
        )
    PatchStore(source)  # raises where there is none
    yield f"stitch: sigma {row.stitch.sigma:g}, {row.stitch.per_class} of each class"
    partial = replace(space, store=f"{space.store}.partial")
    shutil.rmtree(partial.patches, ignore_errors=True)
    shutil.copytree(source, partial.patches, ignore=shutil.ignore_patterns("stitched*"))
    pipeline.stitch(partial, row.stitch, book.space.seed, track=track)
    Path(partial.patches).rename(space.patches)
