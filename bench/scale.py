"""Time and memory of stitching and extraction as classes and patches become many.

Every job runs the real pipeline on files, in a process of its own, whose peak memory is counted.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _jobs import is_job, measured
from _timing import Row, arguments, faster, report
from PIL import Image
from sklearn.datasets import load_sample_images

from dop_fast import models, pipeline, workspace
from dop_fast.concepts.segments import collect
from dop_fast.config import ExtractConfig, StitchConfig
from dop_fast.kernels.slic import slic
from dop_fast.stores import Header, PatchWriter
from dop_fast.types import Array, ClassConcepts, Concept, Segments
from dop_fast.workspace import Workspace

WIDE, HIGH, SIDE = 500, 375, 224
"""ImageNet's usual photograph, and what a network sees of it."""
IMAGES, SEGMENTS, CONCEPTS, MEMBERS, TEMPLATES = 50, 2000, 5, 40, 8
SECONDS_GOAL, MEMORY_GOAL = 60.0, 2048.0
TINY = ExtractConfig(
    images=4, tcav_images=4, n_segments=(5, 10), clusters=4, min_members=2, max_members=8,
    random_sets=4,
)  # fmt: skip


def photographs(folder: Path, count: int, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Write crops of the two photographs of scikit-learn as JPEGs, all different."""
    folder.mkdir(parents=True)
    photos = load_sample_images().images
    for i in range(count):
        top, left = (int(rng.integers(0, limit)) for limit in (427 - HIGH, 640 - WIDE))
        crop = Image.fromarray(photos[i % 2][top : top + HIGH, left : left + WIDE])
        crop.resize(size).save(folder / f"{i:03d}.jpg", quality=92)


def workspace_of(root: Path, classes: int, each: int, side: int, teacher: str) -> Workspace:
    """Make a workspace of `classes` x `each` training images; files are linked, not copied."""
    rng = np.random.default_rng(0)
    size = (WIDE, HIGH) if side == SIDE else (side * 4 // 3, side)
    photographs(root / "photos", TEMPLATES * each, size, rng)
    for class_id in range(classes):
        for part, count in (("train", each), ("val", 1)):
            folder = root / "data" / part / f"class{class_id:04d}"
            folder.mkdir(parents=True)
            for i in range(count):
                photo = class_id % TEMPLATES * each + i
                os.link(root / "photos" / f"{photo:03d}.jpg", folder / f"{i:03d}.jpg")
    made, _, _ = pipeline.init(
        root, data=str(root / "data"), size=side, teacher=teacher, model="", seed=0, force=False
    )
    weights = models.build(teacher, classes, 0)
    models.save_weights(made.teacher_weights, weights, {"model": teacher})
    return workspace.load(root)


def template(sources: Array, rng: np.random.Generator) -> Segments:
    """Return 2,000 of the SLIC segments that extraction would find."""
    config = ExtractConfig(n_segments=(15, 50, 80))
    found = collect(slic(sources, config.n_segments), config.n_segments, config)
    return found.select(np.sort(rng.permutation(len(found))[:SEGMENTS]))


def store_of(space: Workspace) -> None:
    """Write the store that extraction would, of real segments and made-up concepts."""
    rng = np.random.default_rng(1)
    train, _ = pipeline.open_data(space)
    config = pipeline.teacher_config(space)
    teacher = models.load_teacher(config, len(train.classes), space.root)
    settings = {**ExtractConfig().to_dict(), "seed": 0}
    mark = models.fingerprint(teacher)
    header = Header(train.classes, (SIDE, SIDE), 117, train.fingerprint, mark, "layer4", settings)
    writer = PatchWriter(space.patches, header)
    count = min(TEMPLATES, len(train.classes))
    sources = [train.load(train.of_class(class_id)) for class_id in range(count)]
    templates = [template(pixels, rng) for pixels in sources]
    for class_id in range(len(train.classes)):
        segments, pixels = (each[class_id % count] for each in (templates, sources))
        own = train.of_class(class_id)
        images = own[segments.image].astype(np.int32)
        members = rng.permutation(SEGMENTS)[: CONCEPTS * MEMBERS].reshape(CONCEPTS, -1)
        concepts = tuple(
            Concept(np.asarray(part, np.int32), 0.9, np.full(20, 0.9), 0.0, 0.9) for part in members
        )
        found = ClassConcepts(class_id, replace(segments, image=images), concepts)
        first = int(own[0])  # a class's images stand one after the other
        writer.write(found, lambda index, pixels=pixels, first=first: pixels[index - first])
    writer.finish()


def stitch_job(root: Path, per_class: str) -> None:
    config = StitchConfig(per_class=int(per_class))
    pipeline.stitch(workspace.load(root), config, 0, force=True)


def extract_job(root: Path) -> None:
    pipeline.extract(workspace.load(root), TINY, 0, torch.device("cpu"), force=True)


JOBS: dict[str, Callable[..., None]] = {"stitch": stitch_job, "extract": extract_job}


def stitching(root: Path, classes: int) -> list[Row]:
    """Measure 10 and 30 patches of each of 1,000 classes of 2,000 segments."""
    if not (root / workspace.TOML).is_file():
        store_of(workspace_of(root, classes, IMAGES, SIDE, "resnet18"))
    rows = []
    for per_class in (10, 30):
        used = measured(__file__, "stitch", str(root), str(per_class))
        what = f"stitch {classes * per_class:,} patches of {classes:,} classes"
        goal = 1.0 if per_class == 10 else None
        peer = SECONDS_GOAL * classes / 1000
        rows += [
            faster(f"{what}; the goal", used["seconds"], peer, goal, unit="s"),
            faster(f"{what}: CPU time", used["cpu"], None, unit="s"),
            faster(f"{what}: peak memory; the goal", used["mib"], MEMORY_GOAL, 1.0, unit="MiB"),
        ]
    return rows


def extraction(root: Path, sizes: tuple[int, ...]) -> list[Row]:
    """Measure the extraction of ever more classes; the peer is the fewest."""
    rows: list[Row] = []
    for classes in sizes:
        space = root / f"{classes}"
        if not (space / workspace.TOML).is_file():
            workspace_of(space, classes, 8, 16, "resnet20")
        used = measured(__file__, "extract", str(space))
        least = rows[0].ours if rows else used["mib"]
        what = f"extract {classes:,} classes ({used['seconds']:.0f} s): peak memory; the fewest"
        rows.append(faster(what, used["mib"], least, 0.9, unit="MiB"))
    return rows


def main() -> None:
    if is_job(JOBS):
        return
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=Path, help="make the data here, or find it here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        rows = stitching(root / "stitch", 20 if options.quick else 1000)
        rows += extraction(root / "extract", (4, 16) if options.quick else (10, 100, 1000))
    report(rows, ["numpy", "numba", "zarr", "torch", "pillow"], options.json)


if __name__ == "__main__":
    main()
