"""What a sanity check is of, and the file that its results stand in.

Layout of sanity/<sparsity>-s<seed>.json, with the augmentation behind it where there is one;
schema `dopfast.sanity`, version 1:
    about        model, its initial weights, data, sparsity, seed, chunk size, augment, precision
    reliability  {"criterion/material/items/split": the two halves' agreement}
    controls     {"criterion/material/control": overlap with the original, and top1 once trained}
    materials    {"criterion/material/material": overlap of their masks}
Each result says what it was made `of`; what is of something else is measured again.
"""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dop_fast import __version__, criteria, models, runs, stores
from dop_fast.config import PruneConfig, SanityConfig
from dop_fast.errors import ConfigError, StoreError, nearest
from dop_fast.images import ImageSet
from dop_fast.pipeline import alone, open_data, open_patches
from dop_fast.settings import fingerprint
from dop_fast.stores import PatchStore
from dop_fast.types import Batches, Scores
from dop_fast.workspace import Workspace

SCHEMA, VERSION = "dopfast.sanity", 1
PARTS = ("reliability", "controls", "materials")


@dataclass(frozen=True)
class Study:
    """A workspace's data and network, and what is asked; made by `open_study`."""

    workspace: Workspace
    config: SanityConfig
    seed: int
    device: torch.device
    train: ImageSet
    store: PatchStore | None
    materials: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file of results."""
        augment = "" if self.config.augment == "none" else f"-{self.config.augment}"
        return self.workspace.sanity / f"{self.config.sparsity:g}-s{self.seed}{augment}.json"

    def alone(self) -> AbstractContextManager[None]:
        """Return a context in which no other process adds to the file of results."""
        return alone(self.workspace, f"sanity-{self.path.stem}", self.path)

    def model(self, seed: int) -> nn.Module:
        """Return the network with the weights drawn from `seed`, on the device."""
        name, classes = self.workspace.model.name, len(self.train.classes)
        return models.build(name, classes, seed, self.workspace.root).to(self.device)

    def score(self, criterion: str, model: nn.Module, batches: Batches) -> Scores:
        """Return the scores of a criterion that needs data."""
        found = criteria.load(criterion)
        return found.score(
            model, batches, cross_entropy, self.seed, precision=self.config.precision
        )

    def prune_config(self, per_class: int) -> PruneConfig:
        """Return the settings that material is gathered by."""
        config = self.config
        return PruneConfig(
            per_class=per_class, batch_size=config.batch_size, augment=config.augment
        )

    def source(self, material: str) -> str:
        """Return the fingerprint of what a material is made of, beside the images."""
        if material == "images" or self.store is None:
            return ""
        stitching = self.store.stitching if material == "stitched" else None
        return fingerprint(vars(self.store.header), stitching)


def open_study(
    workspace: Workspace, config: SanityConfig, seed: int, device: torch.device
) -> Study:
    """Check what is asked before anything is computed, and open what it needs.

    Raises ConfigError, StoreError and DataError.
    """
    for name in map(str, config.criterion):
        if not criteria.load(name).NEEDS_DATA:
            raise ConfigError(
                f"{name} needs no data, so there is nothing to halve",
                "leave it out: dopfast sanity --criterion snip,grasp",
            )
    if not config.criterion or not config.material:
        raise ConfigError(
            "there is no criterion or no material", "dopfast sanity --criterion snip,grasp"
        )
    train, _ = open_data(workspace)
    asked = dict.fromkeys(map(_known, map(str, config.material)))
    stored = stores.exists(workspace.patches) and set(asked) != {"images"}
    store = open_patches(workspace, train) if stored else None
    model = models.build(workspace.model.name, len(train.classes), seed, workspace.root)
    for name in map(str, config.criterion):
        criteria.check(criteria.load(name), model, config.sparsity)
    about = {
        "model": workspace.model.name,
        "init": models.fingerprint(model),
        "data": train.fingerprint,
        "classes": len(train.classes),
        "sparsity": config.sparsity,
        "seed": seed,
        "batch_size": config.batch_size,
        "augment": config.augment,
        "precision": config.precision,
    }
    return Study(workspace, config, seed, device, train, store, _all(tuple(asked), store), about)


def _known(name: str) -> str:
    (field,) = (f for f in dataclasses.fields(PruneConfig) if f.name == "material")
    known = ("available", *(kind for kind in field.metadata["choices"] if kind != "auto"))
    if name not in known:
        raise ConfigError(f"there is no material {name!r}", nearest(name, known))
    if name == "ones":
        raise ConfigError(
            "all-one matrices are all the same, so their halves agree and it means nothing",
            "leave them out: dopfast sanity --material images,patches,stitched",
        )
    return name


def _all(asked: tuple[str, ...], store: PatchStore | None) -> tuple[str, ...]:
    there = ["images"]
    if store is not None:
        there += ["patches"] + ["stitched"] * (store.stitching is not None)
    expanded = [there if name == "available" else [name] for name in asked]
    return tuple(dict.fromkeys(name for names in expanded for name in names))


class Results:
    """The file of results: what is in it is not measured again."""

    def __init__(self, study: Study, *, force: bool = False) -> None:
        self._path = study.path
        self._content: dict[str, Any] = {part: {} for part in PARTS}
        if force:
            self._content |= _others(study)
        elif self._path.is_file():
            found = read(self._path)
            if found["about"] != study.about:
                wrong = [k for k, v in study.about.items() if found["about"].get(k) != v]
                raise StoreError(
                    f"{self._path} holds results of another {', '.join(wrong)}",
                    "replace them: dopfast sanity --force",
                )
            self._content = found
        self._content |= {
            "schema": SCHEMA, "version": VERSION, "dopfast": __version__, "about": study.about,
            "target": study.config.target,
        }  # fmt: skip

    def __getitem__(self, part: str) -> Mapping[str, Any]:
        """Return the results of a part by their key."""
        found: Mapping[str, Any] = self._content[part]
        return found

    def done(self, part: str, key: str, of: str) -> bool:
        """Return whether the result is there and of the same."""
        return bool(self._content[part].get(key, {}).get("of") == of)

    def put(self, part: str, key: str, row: Mapping[str, Any]) -> None:
        """Keep a result: it is on disk when this returns."""
        self._content[part][key] = dict(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(self._path, self._content)


def _others(study: Study) -> dict[str, dict[str, Any]]:
    """Return the results that are there of criteria and materials that are not asked for.

    None where the file is of something else, or damaged.
    """
    try:
        found = read(study.path)
    except (StoreError, FileNotFoundError):
        return {}
    if found["about"] != study.about:
        return {}

    def other(key: str) -> bool:
        criterion, material, *_ = key.split("/")
        return criterion not in study.config.criterion or material not in study.materials

    return {part: {key: row for key, row in found[part].items() if other(key)} for part in PARTS}


def read(path: Path) -> dict[str, Any]:
    """Return a file of results as it is; StoreError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON: {error}", "delete it") from error
    known = isinstance(content, dict) and content.get("schema") == SCHEMA
    if not known or content.get("version") != VERSION:
        raise StoreError(f"{path} is not {SCHEMA} version {VERSION}", "delete it")
    found: dict[str, Any] = content
    return found
