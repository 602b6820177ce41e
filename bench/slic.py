"""SLIC against scikit-image, OpenCV (contrib) and fast-slic: speed, then how well it follows edges.

Speed: thread CPU time over different photographs, ours and peers in turn, uint8 RGB in, labels
out, connectivity included. Quality: at equal numbers of segments and equal compactness.
"""

import importlib
import io
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import _boundaries
import numpy as np
import torch
from _timing import Row, alternate, arguments, data_folder, faster, report
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.segmentation import slic as skimage_slic
from sklearn.datasets import load_sample_images

from dop_fast.kernels.slic import slic

Photos = list[NDArray[np.uint8]]
Method = Callable[[NDArray[np.uint8], int], NDArray[Any]]
PACKAGES = (
    "numpy", "numba", "llvmlite", "scikit-image", "opencv-contrib-python-headless", "fast-slic",
)  # fmt: skip


def photographs(folder: Path | None, count: int) -> list[Image.Image]:
    """Return photographs of flowers, or crops of scikit-learn's two where there is no data."""
    if folder is None or not (folder / "flowers.zip").exists():
        pictures = load_sample_images().images
        rng = np.random.default_rng(0)
        corners = [rng.integers(0, (170, 380)) for _ in range(count)]
        both = [pictures[k % 2][y : y + 256, x : x + 256] for k, (y, x) in enumerate(corners)]
        return [Image.fromarray(x) for x in both]
    with zipfile.ZipFile(folder / "flowers.zip") as archive:
        names = sorted(x for x in archive.namelist() if x.endswith(".jpg"))
        chosen = names[:: max(1, len(names) // count)][:count]
        return [Image.open(io.BytesIO(archive.read(x))).convert("RGB") for x in chosen]


def square(photo: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return the centre, its shorter side resized to `size`."""
    side = min(photo.size)
    left, top = ((x - side) // 2 for x in photo.size)
    box = (left, top, left + side, top + side)
    return np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC, box))


def long_side(photo: Image.Image, size: int) -> NDArray[np.uint8]:
    scale = size / max(photo.size)
    shape = [max(1, round(x * scale)) for x in photo.size]
    return np.asarray(photo.resize((shape[0], shape[1]), Image.Resampling.BICUBIC))


def ours(image: NDArray[np.uint8], n: int, *, coarse: bool = False) -> NDArray[Any]:
    return np.asarray(slic(image[None], [n], coarse=coarse)[0, 0])


def peers() -> dict[str, Method]:
    """Return the methods that are installed."""
    found: dict[str, Method] = {"scikit-image": _skimage}
    cv2 = importlib.import_module("cv2")
    if hasattr(getattr(cv2, "ximgproc", None), "createSuperpixelSLIC"):
        cv2.setNumThreads(1)
        found["OpenCV"] = lambda image, n: _opencv(cv2, image, n)
    try:
        fast = importlib.import_module("fast_slic.avx2").SlicAvx2
    except ImportError:
        return found
    found["fast-slic"] = lambda image, n: fast(
        num_components=n, compactness=20, num_threads=1
    ).iterate(image)
    return found


def _skimage(image: NDArray[np.uint8], n: int) -> NDArray[Any]:
    values = image.astype(np.float32) / 255
    return np.asarray(skimage_slic(values, n, compactness=20, sigma=1, start_label=0))


def _opencv(cv2: Any, image: NDArray[np.uint8], n: int) -> NDArray[Any]:
    side = round((image.shape[0] * image.shape[1] / n) ** 0.5)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    method = cv2.ximgproc.createSuperpixelSLIC(lab, cv2.ximgproc.SLIC, side, 20.0)
    method.iterate(10)
    method.enforceLabelConnectivity(25)
    return np.asarray(method.getLabels())


def compare(
    what: str,
    images: Photos,
    counts: Sequence[int],
    goals: dict[str, float],
    repeats: int,
    *,
    coarse: bool = False,
) -> list[Row]:
    """Time our one call for all images and counts against a call for each of both."""
    batches = (
        [np.stack(images)] if len({x.shape for x in images}) == 1 else [x[None] for x in images]
    )
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: [slic(batch, counts, coarse=coarse) for batch in batches]
    }
    for name, method in peers().items():
        if name in goals:
            jobs[name] = partial(_each, method, images, counts)
    seconds = alternate(jobs, repeats)
    cost = {name: 1e3 * min(values) / len(images) for name, values in seconds.items()}
    return [
        faster(f"{what}, {name}", cost["ours"], cost.get(name), goal)
        for name, goal in goals.items()
    ]


def _each(method: Method, images: Photos, counts: Sequence[int]) -> None:
    for image in images:
        for n in counts:
            method(image, n)


def speed(photos: list[Image.Image], repeats: int) -> list[Row]:
    """Return the rows of single-thread speed, then of two threads against one."""
    middle, small = ([square(x, size) for x in photos] for size in (224, 32))
    large = [long_side(x, 500) for x in photos[: max(2, len(photos) // 4)]]
    all_peers = {"scikit-image": 45.0, "OpenCV": 20.0, "fast-slic": 3.0}
    rows = compare("224 px, n=50", middle, [50], all_peers, repeats)
    goals = {"scikit-image": 60.0, "fast-slic": 4.0}
    rows += compare("224 px, n=50, coarse", middle, [50], goals, repeats, coarse=True)
    rows += compare("224 px, n=15+50+80", middle, [15, 50, 80], {"fast-slic": 4.0}, repeats)
    for n in (5, 10, 15):
        rows += compare(f"32 px, n={n}", small, [n], {"fast-slic": 6.0}, repeats)
    rows += compare("500 px, n=50", large, [50], {"fast-slic": 2.7}, repeats)
    if os.cpu_count() != 1:
        rows.append(threads(np.stack(middle), repeats))
    return rows


def threads(batch: NDArray[np.uint8], repeats: int) -> Row:
    """Compare the wall time of two threads (ours) with that of one (peer)."""

    def run(count: int) -> None:
        torch.set_num_threads(count)
        slic(batch, [15, 50, 80])

    jobs = {"one": lambda: run(1), "two": lambda: run(2)}
    seconds = alternate(jobs, max(repeats, 5), clock=time.perf_counter)
    one, two = (1e3 * min(seconds[x]) / len(batch) for x in ("one", "two"))
    return faster("two threads, one thread (wall)", two, one, 1.8)


def quality(scenes: list[_boundaries.Scene], where: str, counts: Sequence[int]) -> list[Row]:
    """Compare with scikit-image at equal counts and compactness, and coarse with full."""

    def measured(name: str, compactness: float = 20.0) -> NDArray[np.float64]:
        def method(image: NDArray[np.uint8], n: int) -> NDArray[Any]:
            coarse = name == "coarse"
            labels = slic(image[None], [n], compactness=compactness, coarse=coarse)
            return np.asarray(labels[0, 0])

        use = _skimage if name == "scikit-image" else method
        return _boundaries.at_counts(use, scenes, counts)

    peer, full, looser = measured("scikit-image"), measured("full"), measured("full", 16.0)
    share = (peer[:, 3:] - full[:, 3:]) / (looser[:, 3:] - full[:, 3:])
    equal = full + share * (looser - full)  # as round as theirs
    allowed = full + np.array([-0.003, 0.002, -0.002, 0])
    rows = []
    for name, mine, theirs in (
        ("against scikit-image", equal, peer),
        ("coarse against what it may lose", measured("coarse"), allowed),
    ):
        for k, count in enumerate(counts):
            for column, measure in enumerate(_boundaries.MEASURES[:3]):
                one, other = float(mine[k, column]), float(theirs[k, column])
                ratio = other / one if column == 1 else one / other
                what = f"{where}, {count} segments, {measure}, {name}"
                rows.append(Row(what, "cpu", one, other, "share", ratio, 1.0))
    return rows


def promises(photos: list[Image.Image]) -> list[Row]:
    """Count how often the number of segments and their connection are what was asked."""
    images = [square(x, 224) for x in photos]
    rows = []
    for n in (15, 50, 80, 200):
        kept = [[_kept(method(x, n), n) for x in images] for method in (ours, _skimage)]
        (near, whole), (near_peer, whole_peer) = (np.mean(x, axis=0) for x in kept)
        for what, one, other in (
            (f"photos with {n} segments within 5 %", near, near_peer),
            (f"photos with each of {n} connected and over S^2 / 4", whole, whole_peer),
        ):
            ratio = float(one / other) if other else None
            rows.append(Row(what, "cpu", float(one), float(other), "share", ratio, 1.0))
    return rows


def _kept(labels: NDArray[Any], n: int) -> tuple[bool, bool]:
    areas = np.bincount(labels.ravel())
    parts = sum(ndimage.label(labels == k)[1] for k in range(len(areas)))
    near = abs(len(areas) - n) <= max(1, n // 20)
    return near, bool(parts == len(areas) and 4 * n * areas.min() >= labels.size)


def main() -> None:
    options = arguments(__doc__ or "", bsds=True, data=True).parse_args()
    torch.set_num_threads(1)
    count, repeats = (12, 3) if options.quick else (100, 3)
    photos = photographs(data_folder(options.data), count)
    rows = speed(photos, repeats) + promises(photos[:: max(1, count // 25)])
    torch.set_num_threads(1)
    scenes = [_boundaries.scene(seed) for seed in range(6 if options.quick else 24)]
    rows += quality(scenes, "scenes", (50, 100, 200))
    if options.bsds:
        real = list(_boundaries.bsds(options.bsds, 20 if options.quick else 200))
        rows += quality(real, "BSDS500", (100, 200, 400))
    report(rows, PACKAGES, options.json)


if __name__ == "__main__":
    main()
