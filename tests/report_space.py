"""A small workspace that holds everything a report shows, written through the library."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dop_fast import masks, runs, workspace
from dop_fast.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    StitchConfig,
    TeacherConfig,
    TrainConfig,
)
from dop_fast.images import ImageSet, open_images
from dop_fast.masks import MaskSet
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import ClassConcepts, Concept, Patches, Segments
from dop_fast.workspace import Workspace

SIZE = 32
HOSTILE = """<img src=x onerror="document.title='broken'">' & \n\N{TULIP}"""
NAMES = ("blue", HOSTILE, "red")


def full(root: Path, data: Path) -> Workspace:
    """Return a workspace with concepts, patches, runs and masks of the images at `data`."""
    made = empty(root, data)
    train, _ = open_images(made.data, made.root, 0)
    _write_store(made, train)
    for name, criterion, material, sparsity, seed, top1 in RUNS:
        write_run(made, name, (criterion, material, sparsity, seed), top1)
    for name, mask in MASKS.items():
        masks.save(made.masks / f"{name}.safetensors", mask)
    return made


RUNS = (
    ("a0", "grasp", "stitched", 0.9, 0, 0.70),
    ("a1", "grasp", "stitched", 0.9, 1, 0.72),
    ("a2", "grasp", "stitched", 0.9, 2, 0.71),
    ("b0", "grasp", "stitched", 0.95, 0, 0.65),
    ("c0", "snip", "images", 0.9, 0, 0.685),
    ("d0", "synflow", "none", 0.9, 0, 0.5),
    ("e0", None, None, 0.0, 0, 0.8125),
)


def _mask(bits: str, criterion: str, sparsity: float = 0.5, **about: Any) -> MaskSet:
    kept = torch.tensor([bit == "1" for bit in bits])
    about |= {"criterion": criterion, "material": "images", "sparsity": sparsity, "seed": 0}
    return MaskSet({"conv.weight": kept[:4].reshape(2, 2), "fc.weight": kept[4:]}, about)


MASKS = {
    "first": _mask("11110000", "grasp", on_path={"conv.weight": 2, "fc.weight": 0}, parameters=16),
    "second": _mask("11001100", "snip"),
    "other": _mask("10000000", "grasp", 0.875),
}


def empty(root: Path, data: Path) -> Workspace:
    config = DataConfig(path=str(data), size=SIZE)
    made = Workspace(root, 0, config, TeacherConfig(layer="fc"), ModelConfig("resnet20"), {})
    workspace.create(made)
    return made


def _segments(images: list[int]) -> Segments:
    """Return the top left quarter of each image."""
    count, quarter = len(images), SIZE // 2
    return Segments(
        np.array(images, np.int32),
        np.tile(np.array([0, 0, quarter, quarter], np.int32), (count, 1)),
        np.full(count, 5, np.int16),
        np.arange(count + 1) * quarter * quarter // 8,
        np.full(count * quarter * quarter // 8, 255, np.uint8),
        (SIZE, SIZE),
    )


def _found(class_id: int, train: ImageSet) -> ClassConcepts:
    segments = _segments(train.of_class(class_id).tolist())
    members = np.arange(len(segments), dtype=np.int32)
    runs_of = np.linspace(0.5, 0.9, 41)
    best = Concept(members, float(runs_of.mean()), runs_of, 0.0004, 0.9)
    weak = replace(best, members=members[:4], p_value=0.25)
    return ClassConcepts(class_id, segments, (best, weak))


def _write_store(made: Workspace, train: ImageSet) -> PatchStore:
    config = {**ExtractConfig(clusters=7).to_dict(), "seed": 0}
    header = Header(NAMES, (SIZE, SIZE), 117, train.fingerprint, "teacher", "avgpool", config)
    writer = PatchWriter(made.patches, header)
    for class_id in range(3):
        writer.write(_found(class_id, train))
    store = writer.finish()
    settings = {**StitchConfig(sigma=0.5, per_class=4).to_dict(), "seed": 0}
    store.write_stitched((_stitched(class_id) for class_id in range(3)), 12, settings)
    return store


def _stitched(class_id: int) -> Patches:
    """Return patches that cover a quarter, a half, three quarters and all."""
    valid = np.zeros((4, SIZE, SIZE), np.bool_)
    for i in range(4):
        valid[i, : SIZE * (i + 1) // 4] = True
    pixels = np.full((4, SIZE, SIZE, 3), 50 * class_id, np.uint8)
    return Patches(pixels, valid, np.full(4, class_id), valid.mean((1, 2)) >= 0.5)


def write_run(
    made: Workspace,
    name: str,
    way: tuple[str | None, str | None, float, int],
    top1: float,
    epochs: int = 2,
) -> None:
    criterion, material, sparsity, seed = way
    asked = {"criterion": criterion, "material": material, "sparsity": sparsity, "seed": seed}
    settings = TrainConfig(epochs=epochs, lr=0.05).to_dict()
    folder = made.runs / name
    runs.begin(folder, runs.About("finetune", {"model": "resnet20", **asked}, settings))
    curve = [{"epoch": i + 1, "top1": top1 * i / epochs, "time_s": 1.5} for i in range(epochs)]
    runs.write_metrics(folder, curve)
    runs.finish(folder, {"top1": top1, "top5": 0.99, "loss": 1.0})
