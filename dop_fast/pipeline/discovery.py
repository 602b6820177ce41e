"""What a classifier looks at: concepts of every class, and patches stitched from them."""

from dataclasses import dataclass
from typing import Any

import torch

from dop_fast import models, ranks, stores
from dop_fast.concepts import Extractor
from dop_fast.config import ExtractConfig, StitchConfig
from dop_fast.errors import StoreError
from dop_fast.images import ImageSet
from dop_fast.patches import stitching
from dop_fast.pipeline.opening import alone, open_data, store_key, teacher_config
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import Track, untracked
from dop_fast.workspace import Workspace

RANDOM = "random.zarr"


def extract(
    workspace: Workspace,
    config: ExtractConfig,
    seed: int,
    device: torch.device,
    *,
    force: bool = False,
    track: Track = untracked,
) -> PatchStore:
    """Find every class's concepts (ACE) and store them; an interrupted run goes on.

    Activations of the random sets stay in `RANDOM` for runs with the same teacher and images.
    Ranks share the classes that are to do, and write to one store.
    """
    train, _ = open_data(workspace)
    given = teacher_config(workspace)
    teacher = models.load_teacher(given, len(train.classes), workspace.root)
    extractor = Extractor(
        teacher, given.layer, train, workspace.data, config, seed, device, workspace.root / RANDOM,
        track,
    )  # fmt: skip
    header = Header(
        classes=train.classes,
        canvas=(train.size, train.size),
        fill=config.fill,
        data=train.fingerprint,
        teacher=models.fingerprint(teacher),
        layer=extractor.layer,
        config={**config.to_dict(), "seed": seed},
    )
    with alone(workspace, store_key(workspace), workspace.patches):
        if stores.exists(workspace.patches) and not force:
            store = PatchStore(workspace.patches)
            if store.header == header:
                return store
            raise StoreError(
                f"{workspace.patches} was extracted with other data, teacher or settings",
                "replace it: dopfast extract --force",
            )
        with ranks.first_alone():  # it begins the store
            writer = PatchWriter(workspace.patches, header)
        left = ranks.once(lambda: [i for i in range(len(train.classes)) if not writer.done(i)])
        if left:
            _ = extractor.random
        own = ranks.share(left)
        for class_id in track(own, lambda i: f"extracting {train.classes[i]}", len(own)):
            writer.write(extractor.extract(class_id), train.load)
        ranks.gather(None)  # until each has written its classes
        with ranks.first_alone():
            return writer.finish() if ranks.here().first else PatchStore(workspace.patches)


def open_patches(workspace: Workspace, train: ImageSet) -> PatchStore:
    """Open the workspace's store; StoreError where it is of other data or another teacher."""
    store = PatchStore(workspace.patches)
    again = "dopfast extract --force"
    if store.header.data != train.fingerprint:
        raise StoreError(f"{workspace.patches} was extracted from other images", again)
    teacher = models.load_teacher(teacher_config(workspace), len(train.classes), workspace.root)
    if store.header.teacher != models.fingerprint(teacher):
        raise StoreError(f"{workspace.patches} was extracted with another teacher", again)
    return store


@dataclass(frozen=True)
class Stitched:
    """How Super Stitching went: coverage r by class, and how many patches stayed below sigma.

    `visible`: the mean share of a patch that shows each concept, the most important one first.
    """

    store: PatchStore
    coverage: dict[str, float]
    short: dict[str, int]
    visible: list[float]


def stitch(
    workspace: Workspace,
    config: StitchConfig,
    seed: int,
    *,
    force: bool = False,
    track: Track = untracked,
) -> Stitched:
    """Stitch every class's concepts (Algorithm 2) into the store."""
    train, _ = open_data(workspace)
    with alone(workspace, store_key(workspace), workspace.patches):
        store = open_patches(workspace, train)
        about = {**config.to_dict(), "seed": seed}
        found = store.stitching
        if found is not None and found != about and not force:
            raise StoreError(
                f"{store.path} already has stitched patches, made with other settings",
                "replace them: dopfast stitch --force",
            )
        names = store.header.classes
        if found is None or force:
            parts = stitching.stitch_all(store, train, config, seed, track)
            store.write_stitched(parts, len(names) * config.per_class, about)
    return _stitched(store, config)


def _stitched(store: PatchStore, config: StitchConfig) -> Stitched:
    coverage = store.coverage().reshape(-1, config.per_class)  # class by class
    names = store.header.classes
    short = (coverage < config.sigma).sum(axis=1)
    return Stitched(
        store,
        dict(zip(names, coverage.mean(axis=1).tolist(), strict=True)),
        {name: int(count) for name, count in zip(names, short, strict=True) if count},
        store.visible().tolist(),
    )


def concept_table(store: PatchStore, alpha: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each class, and the classes without one significant concept."""
    rows, weak = [], []
    for class_id, name in enumerate(store.header.classes):
        found = store.concepts(class_id)
        best = found.concepts[0] if found.concepts else None
        rows.append(
            {
                "class": name,
                "segments": len(found.segments),
                "concepts": len(found.concepts),
                "tcav": best.tcav if best else None,
                "p": best.p_value if best else None,
            }
        )
        if not any(concept.significant(alpha) for concept in found.concepts):
            weak.append(name)
    return rows, weak
