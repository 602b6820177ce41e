"""The whole job in one go, on images whose evidence is known: what `dopfast demo` runs."""

import shutil
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dop_fast import demo, disk, pipeline, report, workspace
from dop_fast.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    PruneConfig,
    StitchConfig,
    TeacherConfig,
    TrainConfig,
)
from dop_fast.demo import Precision
from dop_fast.errors import StoreError
from dop_fast.training import Epoch
from dop_fast.types import Track, untracked
from dop_fast.workspace import TOML, Workspace

IMAGES, SIZE = "data", 40
SPARSITY = 0.95
TEACHER = TrainConfig(
    epochs=12, lr=0.05, batch_size=32, milestones=(0.6, 0.85), warmup=0.1, weight_decay=5e-4
)
STUDENT = replace(TEACHER, epochs=8)
EXTRACT = ExtractConfig(n_segments=(15, 30))  # segments that are a little smaller than the objects
RIVALS = (("grasp", "images"), ("grasp", "patches"), ("grasp", "stitched"), ("random", "auto"))

Steps = Generator[str | Epoch, None, "Showcase"]


@dataclass(frozen=True)
class Showcase:
    """What came out: accuracies by mask, how well concepts lie on the objects, and the page."""

    teacher: dict[str, float]
    masks: dict[str, dict[str, float]]
    precision: Precision
    page: Path

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def run(
    folder: Path, seed: int, device: torch.device, *, force: bool = False, track: Track = untracked
) -> Steps:
    """Run every stage in `folder` that is not finished; yield what begins and every epoch."""
    space = _workspace(folder, seed, force)
    with pipeline.alone(space, "demo", folder):
        if force:
            _clear(space)
        if not (folder / IMAGES).exists():
            demo.write_images(folder / IMAGES, seed, size=SIZE)
        return (yield from _stages(space, seed, device, track))


def _stages(space: Workspace, seed: int, device: torch.device, track: Track) -> Steps:
    yield f"teacher: {space.teacher.name}, {TEACHER.epochs} epochs"
    teacher = yield from pipeline.train(space, TEACHER, seed, device, track=track)
    yield "extract: concepts of every class"
    store = pipeline.extract(space, EXTRACT, seed, device, track=track)
    train, _ = pipeline.open_data(space)
    precision = demo.precision(store, train, demo.load_truth(space.root / IMAGES))
    yield f"stitch: patches that cover {StitchConfig().sigma:g} of the image"
    pipeline.stitch(space, StitchConfig(), seed, track=track)
    masks = {}
    for criterion, material in RIVALS:
        config = PruneConfig(criterion=criterion, material=material, sparsity=SPARSITY)
        path, kept, _ = pipeline.prune(space, config, seed, device, track=track)
        yield f"prune and fine-tune: {path.stem}, {STUDENT.epochs} epochs"
        target = pipeline.run_folder(space, path.stem, "", seed)
        masks[path.stem] = yield from pipeline.finetune(
            space, STUDENT, (path.stem, kept), target, seed, device, track=track
        )
    return Showcase(teacher, masks, precision, report.write(space, track))


def _workspace(folder: Path, seed: int, force: bool) -> Workspace:
    """Return the demo's workspace; its settings are its first file, and tell it from others."""
    images = folder / IMAGES
    data = DataConfig(path=str(images.resolve()), size=SIZE)
    network = "resnet20"
    fresh = Workspace(folder, seed, data, TeacherConfig(network), ModelConfig(network), {})
    there = workspace.load(folder) if (folder / TOML).is_file() else None
    if there:
        known = demo.has_truth(images) if images.exists() else there.data == data
    else:
        known = not folder.exists() or disk.only_begun(folder, TOML)
    if not known:
        raise StoreError(f"{folder} holds other files", "name another folder: dopfast demo -o DIR")
    if there and not force:
        return there
    workspace.create(fresh, force=True)
    return fresh


def _clear(space: Workspace) -> None:
    """Remove all but the settings and the claims; the images at once, so that no half stays."""
    images = space.root / IMAGES
    if images.exists():
        images.rename(images.with_name(f"{IMAGES}.old.partial"))
    for path in space.root.iterdir():
        if path.name not in (TOML, space.claims.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
