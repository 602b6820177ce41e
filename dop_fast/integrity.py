"""Whether everything in a workspace is as it was written: all that has a checksum is read.

Stores: every chunk, that none is missing, no class either, and the metadata of each finished
group. Masks, checkpoints and weights: every byte. JSON files have no checksum, and are only read.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from dop_fast import places, runs, seals, stores
from dop_fast.errors import DopFastError, StoreError
from dop_fast.pipeline.discovery import RANDOM
from dop_fast.places import Place
from dop_fast.workspace import Workspace

BLOCK = 64
"""Rows that are read at once: one shard of stitched patches."""
SOUND, DAMAGED, UNKNOWN = "sound", "damaged", "no checksum"
MADE = (runs.METRICS, runs.WEIGHTS)
"""What every finished run has."""
TRAIN_AGAIN = "train it again: dopfast train --force"


@dataclass(frozen=True)
class Finding:
    """The state of one file or group: `SOUND`, `DAMAGED` or `UNKNOWN`; what is wrong, and a way on.

    `path` is seen from the workspace.
    """

    path: str
    state: str
    about: str = ""
    hint: str = ""


def verify(workspace: Workspace) -> Iterator[Finding]:
    """Yield a finding for every group of the stores, then for every file of masks and runs."""
    if stores.exists(workspace.patches):
        yield from _store(Place(workspace.patches), workspace, stores.AGAIN)
    if (workspace.root / RANDOM).exists():
        yield from _store(Place(workspace.root / RANDOM), workspace, f"delete {RANDOM}")
    for path in sorted(workspace.sweeps.glob("*.zarr")):
        name = f"{workspace.sweeps.name}/{path.name}"
        yield from _store(Place(path), workspace, f"delete {name}, and run the sweep again")
    for path in sorted(workspace.masks.glob("*.safetensors")):
        yield _sealed(path, workspace, f"make it again: dopfast prune --force --name {path.stem}")
    if workspace.teacher_weights.is_file():
        yield _sealed(workspace.teacher_weights, workspace, TRAIN_AGAIN)
    for folder in sorted(path.parent for path in workspace.runs.glob(f"*/{runs.MANIFEST}")):
        again = f"train it again: dopfast finetune --force --name {folder.name}"
        again = TRAIN_AGAIN if folder == workspace.teacher_run else again
        for path in sorted(folder.glob("*.safetensors")):
            yield _sealed(path, workspace, again)
        yield _read(folder, workspace, again)
    for path in sorted(workspace.sanity.rglob("*.safetensors")):
        yield _sealed(path, workspace, "measure it again: dopfast sanity")
    for path in sorted(workspace.sanity.glob("*.json")):
        yield _read(path, workspace, "delete it, and measure again: dopfast sanity")
    for path in sorted(workspace.exports.glob("*.safetensors")):
        yield _sealed(path, workspace, "write it again: dopfast export --force ...")


def _store(place: Place, workspace: Workspace, hint: str) -> Iterator[Finding]:
    """Yield a finding for the group and for each one below it."""
    name = str(place).removeprefix(f"{workspace.root}/")
    own = stores.STITCH_AGAIN if place.name == "stitched" else hint
    below: list[str] = []
    arrays: list[Any] = []
    try:
        with warnings.catch_warnings(), places.reading(place, own):
            warnings.simplefilter("error")  # Zarr passes over what it does not know
            group = place.group()
            below = sorted(_groups(place, group))
            arrays = [array for _, array in group.arrays()]
            if (arrays or not place.name) and place.broken():
                raise ValueError("its metadata are not those that were written")
            for array in arrays:
                place.refuse_gaps(array)
                for start in range(0, array.shape[0], BLOCK):
                    _ = array[start : start + BLOCK]
    except StoreError as error:
        yield Finding(name, DAMAGED, error.message, error.hint)
    else:
        if arrays or not place.name:
            yield Finding(name, SOUND)
    for key in below:
        yield from _store(place / key, workspace, hint)


def _groups(place: Place, group: zarr.Group) -> set[str]:
    """Return the groups below one: those that are there, and those that must be."""
    found = set(group.group_keys())
    if "header" in group.attrs:
        found.add(stores.CLASSES)
    if place.name == stores.CLASSES:
        header: Any = Place(place.address).group().attrs["header"]
        found |= {str(class_id) for class_id in range(len(header["classes"]))}
    return {key for key in found if not key.endswith(".partial")}


def _sealed(path: Path, workspace: Workspace, hint: str) -> Finding:
    name = str(path.relative_to(workspace.root))
    if not seals.has(path):
        return Finding(name, UNKNOWN, "it was not made by dopfast, or is damaged", hint)
    if seals.broken(path):
        return Finding(name, DAMAGED, f"{name} is not what was written", hint)
    return Finding(name, SOUND)


def _read(path: Path, workspace: Workspace, hint: str) -> Finding:
    """Look at the JSON files of a run, or at one of another kind."""
    name = str(path.relative_to(workspace.root))
    try:
        if path.is_dir():
            run = runs.read(path)
            runs.metrics(path)
            lacking = [file for file in MADE if run.finished and not (path / file).is_file()]
            if lacking:
                raise ValueError(f"it is finished and lacks {', '.join(lacking)}")
        else:
            json.loads(path.read_bytes())
    except (DopFastError, ValueError) as error:
        return Finding(name, DAMAGED, f"{name}: {error}", hint)
    return Finding(name, SOUND)
