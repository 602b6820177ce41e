"""Stitching per patch against plain NumPy, and the store of patches against bare files."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numcodecs
import numpy as np
from _timing import Row, alternate, arguments, faster, report
from sklearn.datasets import load_sample_images

from dop_fast.concepts.segments import collect
from dop_fast.config import ExtractConfig, StitchConfig
from dop_fast.kernels.paste import cpu, reference
from dop_fast.kernels.slic import slic
from dop_fast.patches.stitching import stitch_class
from dop_fast.stores import Header, PatchWriter
from dop_fast.types import Array, ClassConcepts, Concept, Patches, Segments

SIDE, FILL, CONCEPTS, MEMBERS = 224, 117, 5, 40
RATIO_GOAL, WRITE_GOAL = 250.0, 0.8
BUDGET_US = {0.5: 40.0, 0.75: 70.0}
PER_CLASS = {0.5: 30, 0.75: 10}
"""By sigma: microseconds for a patch, and as many patches of a class as in the paper."""


def photographs(count: int, rng: np.random.Generator) -> Array:
    """Return crops of the two photographs of scikit-learn, uint8[count side side 3]."""
    photos = load_sample_images().images
    corners = rng.integers(0, np.array(photos[0].shape[:2]) - SIDE, (count, 2))
    return np.stack([photos[i % 2][y : y + SIDE, x : x + SIDE] for i, (y, x) in enumerate(corners)])


def one_class(sources: Array, rng: np.random.Generator) -> tuple[ClassConcepts, Array]:
    """Return 5 concepts of 40 SLIC segments each, of about 2 % of an image, and their images."""
    segments = collect(slic(sources, (50,)), (50,), ExtractConfig())
    segments = segments.select(rng.permutation(len(segments))[: CONCEPTS * MEMBERS])
    images, image = np.unique(segments.image, return_inverse=True)
    members = np.arange(len(segments), dtype=np.int32).reshape(CONCEPTS, MEMBERS)
    concepts = tuple(Concept(part, 0.5, np.full(2, 0.5), 0.0, 0.9) for part in members)
    return ClassConcepts(0, replace(segments, image=image), concepts), sources[images]


def queue_of(patches: int, rng: np.random.Generator) -> Array:
    """Return rounds of one segment of each concept, enough for all patches."""
    fillings = np.tile(np.arange(MEMBERS), (CONCEPTS, 2 * patches, 1))
    shuffled = rng.permuted(fillings, axis=2).reshape(CONCEPTS, -1)
    return (shuffled + MEMBERS * np.arange(CONCEPTS)[:, None]).T.copy()


def in_boxes(
    segments: Segments, sources: Array, placements: Array, starts: Array
) -> tuple[Array, Array]:
    """Paint as `reference.paint`, in NumPy at its best: only inside the boxes."""
    pixels = np.full((len(starts) - 1, SIDE, SIDE, 3), FILL, np.uint8)
    valid = np.zeros(pixels.shape[:3], np.bool_)
    masks = [segments.mask(index) for index in range(len(segments))]
    for canvas, start in enumerate(starts[:-1]):
        for index in placements[start : starts[canvas + 1]]:
            top, left, bottom, right = segments.box[index]
            box = (slice(top, bottom), slice(left, right))
            source = sources[segments.image[index]][box]
            np.copyto(pixels[canvas][box], source, where=masks[index][..., None])
            valid[canvas][box] |= masks[index]
    return pixels, valid


@dataclass(frozen=True)
class Work:
    """One class's stitching, decided: its segments, source pixels, rounds and placements."""

    found: ClassConcepts
    sources: Array
    segments: Segments
    queue: Array
    starts: Array

    def run(self, paste: ModuleType, sigma: float) -> tuple[Array, tuple[Array, Array]]:
        """Choose and paint with one of the twins; return where patches end, pixels and valid."""
        ends = paste.cover(self.segments, self.queue, sigma, len(self.starts) - 1)
        placements = self.queue[: ends[-1]].ravel()
        return ends, paste.paint(self.segments, self.sources, placements, self.starts, FILL)


def prepared(sigma: float, patches: int, seed: int) -> Work:
    rng = np.random.default_rng(seed)
    found, sources = one_class(photographs(40, rng), rng)
    segments = found.segments.select(np.concatenate([part.members for part in found.concepts]))
    queue = queue_of(patches, rng)
    starts = np.array([0, *cpu.cover(segments, queue, sigma, patches)]) * CONCEPTS
    work = Work(found, sources, segments, queue, starts)
    (ends, ours), (plain_ends, plain) = (work.run(paste, sigma) for paste in (cpu, reference))
    boxed = in_boxes(segments, sources, queue[: ends[-1]].ravel(), starts)
    assert ends.tolist() == plain_ends.tolist()
    for one, other, third in zip(ours, plain, boxed, strict=True):
        assert np.array_equal(one, other) and np.array_equal(third, other)
    return work


def stitching(sigma: float, patches: int, classes: int, repeats: int) -> list[Row]:
    """Time choosing and painting, class after class, in one thread, source pixels at hand."""
    works = [prepared(sigma, patches, seed) for seed in range(classes)]
    config = StitchConfig(sigma=sigma, per_class=patches)

    def ours() -> None:
        for work in works:
            work.run(cpu, sigma)

    def plain() -> None:
        for work in works:
            work.run(reference, sigma)

    def boxes() -> None:
        for work in works:
            placements = work.queue.ravel()[: work.starts[-1]]
            in_boxes(work.segments, work.sources, placements, work.starts)

    def whole() -> None:
        for work in works:
            stitch_class(work.found, lambda index, work=work: work.sources, config, FILL, 0)

    times = alternate({"ours": ours, "whole": whole, "boxes": boxes, "plain": plain}, repeats)
    cost = {name: min(seconds) / patches / classes * 1e6 for name, seconds in times.items()}
    placed = sum(work.starts[-1] for work in works) / patches / classes
    what = f"stitch at sigma {sigma:g} ({placed:.0f} segments)"
    return [
        faster(f"{what}: plain NumPy", cost["ours"], cost["plain"], RATIO_GOAL, unit="us"),
        faster(f"{what}: the budget", cost["ours"], BUDGET_US[sigma], 1.0, unit="us"),
        faster(f"{what}: NumPy in boxes, choice given", cost["ours"], cost["boxes"], unit="us"),
        faster(f"{what}: with draws; plain without", cost["whole"], cost["plain"], unit="us"),
    ]


def writing(patches: Patches, classes: int, repeats: int, folder: Path) -> list[Row]:
    """Time the store against compressing and writing the same bytes one after the other."""
    codec = numcodecs.Blosc("lz4", 5, numcodecs.Blosc.NOSHUFFLE)  # the store's
    header = Header(("a",), (SIDE, SIDE), FILL, "", "", "", {})

    def ours() -> None:
        store = PatchWriter(folder / "ours.zarr", header).finish()
        store.write_stitched([patches] * classes, len(patches) * classes, {})

    def bare() -> None:
        with (folder / "bare.bin").open("wb") as file:
            for _ in range(classes):
                for pixels, valid in zip(patches.pixels, patches.valid, strict=True):
                    file.write(codec.encode(pixels))
                    file.write(codec.encode(np.packbits(valid)))

    what = f"store {len(patches) * classes} patches; bare file of the same codec"
    rows = []
    for clock, goal, name in (
        (time.perf_counter, WRITE_GOAL, what),
        (time.process_time, None, f"{what}: CPU time"),
    ):
        times = alternate({"ours": ours, "bare": bare}, repeats, clock=clock)
        cost = {job: min(seconds) * 1e3 for job, seconds in times.items()}
        rows.append(faster(name, cost["ours"], cost["bare"], goal))
    return rows


def main() -> None:
    options = arguments(__doc__).parse_args()
    classes, repeats = (2, 2) if options.quick else (4, 10)
    rows = []
    for sigma, patches in PER_CLASS.items():
        rows += stitching(sigma, patches, classes, repeats)
    work = prepared(0.75, 30, 0)
    pixels, valid = work.run(cpu, 0.75)[1]
    made = Patches(pixels, valid, np.zeros(30, np.int64), np.ones(30, np.bool_))
    with tempfile.TemporaryDirectory() as folder:
        rows += writing(made, *((2, 2) if options.quick else (20, 8)), Path(folder))
    report(rows, ["numpy", "numba", "zarr", "numcodecs"], options.json)


if __name__ == "__main__":
    main()
