"""What a training leaves on disk: the last finished epoch, the best one's weights, the final ones.

Layout of the checkpoint (safetensors), schema `dopfast.checkpoint`, version 2: the tensors of
`State.tensors`; metadata, each as JSON: `about`, what is trained, `epochs`, a record each, and
`unreadable`, the images that were left out. It is one file, so that a kill at any moment leaves
tensors and records that belong together. Inside an epoch none is written: a kill costs half an
epoch on average, of the paper's 120.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dop_fast import models, runs, seals
from dop_fast.errors import StoreError

SCHEMA, VERSION = "dopfast.checkpoint", "2"


class Saved(NamedTuple):
    """A state by tensors, the records of its epochs, and the names of unreadable images."""

    tensors: dict[str, Tensor]
    epochs: list[dict[str, Any]]
    unreadable: list[str]


@dataclass(frozen=True)
class Checkpoint:
    """Writes and reads the state of one training in a folder.

    `about`, JSON values, says which training it is; that of another one is refused.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / runs.CHECKPOINT

    def save(self, saved: Saved) -> None:
        """Store the state after the last of its epochs; StoreError where the disk is full."""
        metadata = {
            "schema": SCHEMA,
            "version": VERSION,
            "about": json.dumps(self.about),
            "epochs": json.dumps(saved.epochs),
            "unreadable": json.dumps(saved.unreadable),
        }
        models.save_tensors(self.path, saved.tensors, metadata)

    def read(self) -> Saved | None:
        """Return what is stored; None where nothing is.

        StoreError for a file that is damaged or of another training.
        """
        if not self.path.is_file():
            return None
        if seals.broken(self.path):
            raise StoreError(f"{self.path} is damaged: its checksum is wrong", runs.START_OVER)
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._refuse_other(metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise StoreError(f"{self.path} is damaged: {error}", runs.START_OVER) from error
        return Saved(tensors, json.loads(metadata["epochs"]), json.loads(metadata["unreadable"]))

    def _refuse_other(self, metadata: Mapping[str, str]) -> None:
        if (metadata.get("schema"), metadata.get("version")) != (SCHEMA, VERSION):
            raise StoreError(f"{self.path} is not {SCHEMA} version {VERSION}", runs.START_OVER)
        there, asked = json.loads(metadata["about"]), json.loads(json.dumps(self.about))
        differ = [key for key in asked if there.get(key) != asked[key]]
        if differ:
            raise StoreError(
                f"{self.folder} holds a training with other {', '.join(differ)}", runs.START_OVER
            )


def keep_epoch(
    folder: Path,
    weights: Mapping[str, Tensor],
    accuracies: Sequence[float],
    every: int,
    about: Mapping[str, str],
) -> None:
    """Keep the last epoch's weights where it is the best so far, or an `every`-th one.

    `accuracies` are of all epochs. Called again after a kill it does what is left.
    """
    epoch = len(accuracies)
    names = [runs.BEST] if accuracies.index(max(accuracies)) == epoch - 1 else []
    names += [runs.EPOCH.format(epoch)] if every and epoch % every == 0 else []
    for path in (folder / name for name in names):
        if _epoch_of(path) != str(epoch):
            said = {**about, "epoch": str(epoch), "top1": f"{accuracies[-1]:.6f}"}
            models.save_tensors(path, weights, said)


def _epoch_of(path: Path) -> str:
    if not path.is_file():
        return ""
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata.get("epoch", "")
