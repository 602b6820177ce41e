"""The last finished epoch in one file: a kill at any moment leaves it, or the one before, whole.

Layout (safetensors), schema `dopfast.checkpoint`, version 1: `model.<name>` the state, then
`momentum.<name>` SGD's buffers; metadata `about`: what is trained, and `epochs`: a record each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dop_fast import models, runs, seals
from dop_fast.errors import StoreError
from dop_fast.masks import MaskSet
from dop_fast.training.masking import check

SCHEMA, VERSION = "dopfast.checkpoint", "1"


@dataclass(frozen=True)
class Checkpoint:
    """Writes and restores the state of one training in a folder.

    `about`, JSON values, says which training it is; that of another one is refused.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / runs.CHECKPOINT

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        mask_set: MaskSet | None,
        epochs: list[dict[str, Any]],
    ) -> None:
        """Store the state after the last of `epochs`."""
        momentum = _momentum(model, optimizer)
        check(mask_set, model.state_dict(), momentum)
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"momentum.{name}": value for name, value in momentum.items()}
        metadata = {
            "schema": SCHEMA,
            "version": VERSION,
            "about": json.dumps(self.about),
            "epochs": json.dumps(epochs),
        }
        models.save_tensors(self.path, tensors, metadata)

    def restore(self, model: nn.Module, optimizer: torch.optim.SGD) -> list[dict[str, Any]]:
        """Bring back the stored state in place and return its epochs; none where nothing is stored.

        StoreError for a file that is damaged or of another training.
        """
        if not self.path.is_file():
            return []
        if seals.broken(self.path):
            raise StoreError(f"{self.path} is damaged: its checksum is wrong", runs.START_OVER)
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                self._refuse_other(metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise StoreError(f"{self.path} is damaged: {error}", runs.START_OVER) from error
        _fill(model, optimizer, tensors)
        epochs: list[dict[str, Any]] = json.loads(metadata["epochs"])
        return epochs

    def _refuse_other(self, metadata: Mapping[str, str]) -> None:
        if (metadata.get("schema"), metadata.get("version")) != (SCHEMA, VERSION):
            raise StoreError(f"{self.path} is not {SCHEMA} version {VERSION}", runs.START_OVER)
        there, asked = json.loads(metadata["about"]), json.loads(json.dumps(self.about))
        differ = [key for key in asked if there.get(key) != asked[key]]
        if differ:
            raise StoreError(
                f"{self.folder} holds a training with other {', '.join(differ)}", runs.START_OVER
            )


def _momentum(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    buffers = {
        name: optimizer.state[parameter].get("momentum_buffer")
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def _fill(model: nn.Module, optimizer: torch.optim.SGD, tensors: Mapping[str, Tensor]) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    model.load_state_dict(part("model."))
    parameters = dict(model.named_parameters())
    for name, tensor in part("momentum.").items():
        parameter = parameters[name]
        # in the parameter's own memory layout, which a fused step needs
        buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        optimizer.state[parameter]["momentum_buffer"] = buffer
