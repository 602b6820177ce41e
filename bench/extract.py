"""Extraction against the authors' way: composing, one class stage by stage, what options cost.

One class: 50 photographs at 224 px, ResNet-50 with random weights whose batch norms have
statistics. A stage that takes minutes is timed on a sample, as its row says, and scaled; totals
are sums of such figures, with 15 concepts assumed. One thread and its CPU time; on a GPU the clock.
Agreement: TCAV of the same clusters of CIFAR-10, by a trained ResNet-20.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import _parts
import numpy as np
import torch
from _timing import Row, alternate, arguments, data_folder, faster, report
from PIL import Image
from scipy.stats import spearmanr
from skimage.segmentation import slic as skimage_slic
from sklearn.cluster import KMeans
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
from slic import photographs, square
from torch import Tensor, nn

from dop_fast import models
from dop_fast.concepts import Extractor
from dop_fast.concepts.activations import Probe
from dop_fast.concepts.cavs import hold, tcav
from dop_fast.concepts.clusters import Cluster, cluster
from dop_fast.concepts.features import Exact, Roi, Seen, at_once
from dop_fast.concepts.segments import LARGE, segment
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.images import normalise, open_images
from dop_fast.kernels.compose import Entry, compose, reference
from dop_fast.types import Array, Segments

SIDE, IMAGES, CONCEPTS, FILL = 224, 50, 15, 117
DATA, CONFIG = DataConfig(), ExtractConfig(amp="auto")
ENTRY = Entry(SIDE, FILL, DATA.mean, DATA.std)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = ("numpy", "numba", "torch", "torchvision", "pillow", "scikit-image", "scikit-learn")


@dataclass(frozen=True)
class Sample:
    """How much of a long stage is run: images, segments, and forwards of the authors' way."""

    images: int
    segments: int
    forwards: int
    fits: int


@dataclass(frozen=True)
class Stage:
    """Seconds of one class's stage; `forward` where nearly all of it is the network."""

    what: str
    ours: float
    peer: float
    forward: bool = False


class Free(Probe):
    """A network whose forward costs nothing."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given, self.device, self.amp = given, DEVICE, CONFIG.amp

    def activations(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consume the batches and yield what was given."""
        for _, activation in zip(batches, self.given, strict=True):
            yield activation


def seconds(job: Callable[[], object], repeats: int = 2) -> float:
    """Return the least seconds of a job, the first of its runs not counted."""
    cuda = DEVICE.type == "cuda"
    sync: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
    clock = time.perf_counter if cuda else time.thread_time
    return min(alternate({"job": job}, repeats, clock=clock, sync=sync)["job"])


def once(job: Callable[[], object]) -> float:
    """Return the seconds of the authors' slow stages, which compile nothing."""
    start = time.thread_time()
    job()
    return time.thread_time() - start


def buffer(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((count, SIDE, SIDE, 3), dtype=dtype, device=DEVICE)


def composing(sources: Array, segments: Segments, count: int) -> list[Row]:
    """Compare with PIL and NumPy, from the same segments to the same normalised batch."""
    index = np.random.default_rng(0).permutation(len(segments))[:count]
    on_device = torch.from_numpy(sources).to(DEVICE)
    clock = time.perf_counter if DEVICE.type == "cuda" else time.thread_time
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        made = buffer(count, dtype)
        jobs: dict[str, Callable[[], object]] = {
            "ours": lambda out=made: compose(on_device, segments, index, ENTRY, out),
            "PIL": lambda: reference.compose(sources, segments, index, ENTRY),
        }
        spent = alternate(jobs, 5, clock=clock)
        ours, peer = (1e6 * min(spent[name]) / count for name in ("ours", "PIL"))
        what = f"compose a segment, {str(dtype).removeprefix('torch.')}, PIL and NumPy"
        rows.append(faster(what, ours, peer, 10.0, unit="us", device=DEVICE.type))
    return rows


def resnet50(photos: Array) -> tuple[nn.Module, str]:
    """Return a ResNet-50 of random weights whose batch norms know photographs, and its layer."""
    model = models.build("resnet50", 10, 0).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all that it sees
    with torch.no_grad():
        model(normalise(torch.from_numpy(photos[:8]), DATA.mean, DATA.std))
    return model.eval(), "layer4"


def authors_masks(image: Array, labels: list[Array]) -> list[Array]:
    """Return float64 masks that differ from those of earlier resolutions, pair by pair."""
    kept: list[Array] = []
    for regions in labels:
        found = []
        for label in range(regions.max()):
            mask = (regions == label).astype(np.float64)
            if mask.mean() <= 0.001:
                continue
            overlap = (np.sum(seen * mask) / np.sum((seen + mask) > 0) for seen in kept)
            if not any(value > 0.5 for value in overlap):
                found.append(mask)
        kept += found
    return kept


def authors_crop(image: Array, mask: Array) -> Array:
    """Return ACE's patch: float64, the tight box stretched by PIL."""
    whole = mask[..., None] * image + (1 - mask[..., None]) * FILL / 255
    rows, columns = np.where(mask > 0)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    crop = Image.fromarray((whole * 255).astype(np.uint8)).crop(box)
    return np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255


def authors_front(sources: Array, sample: Sample) -> tuple[float, float, float, int]:
    """Return the seconds of SLIC, of masks and of a crop for an image, and crops of an image."""
    floats = sources[: sample.images].astype(np.float64) / 255
    cut: list[list[Array]] = []
    masks: list[list[Array]] = []

    def slic() -> None:
        for image in floats:
            cut.append([skimage_slic(image, n, compactness=20, sigma=1.0) for n in LARGE])

    slic_s = once(slic)
    mask_s = once(lambda: masks.extend(map(authors_masks, floats, cut)))
    crop_s = once(lambda: [authors_crop(floats[0], mask) for mask in masks[0]])
    each = sum(map(len, masks)) / len(masks)
    return slic_s / len(floats), mask_s / len(floats), crop_s / len(masks[0]), round(each)


def authors_forward(model: nn.Module, count: int) -> float:
    """Return the seconds of one segment's forward in float32, NCHW."""
    batch, model = torch.randn(count, 3, SIDE, SIDE, device=DEVICE), model.to(DEVICE)

    def run() -> None:
        with torch.no_grad():
            model(batch)

    return seconds(run, 1) / count


def authors_gradient(model: nn.Module) -> float:
    """Return the seconds of one image's forward and gradient."""
    photo = torch.randn(1, 3, SIDE, SIDE, device=DEVICE, requires_grad=True)
    return seconds(lambda: model(photo).log_softmax(1)[0, 0].backward(), 1)


def sgd(rows: Array, fits: int) -> float:
    """Return the seconds of one published separator on whole maps."""
    labels = np.repeat([1, 0], len(rows) // 2)

    def fit(seed: int) -> None:
        x, _, y, _ = train_test_split(rows, labels, test_size=0.33, stratify=labels)
        SGDClassifier(alpha=0.01, max_iter=1000, tol=1e-3, random_state=seed).fit(x, y)

    return once(lambda: [fit(seed) for seed in range(fits)]) / fits


def jittered(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` rows that resemble those of the sample."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    drawn = torch.randint(len(rows), (count,), generator=generator, device=rows.device)
    noise = torch.randn((count, 1), generator=generator, device=rows.device)
    return (rows[drawn] * (1 + 0.1 * noise) + 0.1 * rows[drawn.roll(1)]).to(rows.dtype)


def separating(maps: Tensor, photos: int) -> Callable[[], object]:
    """Return the job of all of a class's separators and scores, from rows like `maps`."""
    sets = CONFIG.random_sets
    rows = jittered(maps, sets * CONFIG.max_members, 1).reshape(sets, CONFIG.max_members, -1)
    gradients = jittered(maps, photos, 2) - maps.mean(0)
    concepts = jittered(maps, CONCEPTS * CONFIG.max_members, 3).reshape(CONCEPTS, -1, len(maps[0]))

    def run() -> None:
        against = hold(rows, gradients)
        for concept in concepts:
            tcav(concept, against, "ridge", 0)

    return run


def stages(
    sources: Array, segments: Segments, model: nn.Module, layer: str, sample: Sample
) -> tuple[list[Stage], float, list[Row]]:
    """Return one class's stages, the seconds of a segment's bare forward, and rows of parts."""
    probe = Probe(model, layer, DEVICE, CONFIG.amp)
    exact, count = Exact(probe, DATA, CONFIG), len(segments)
    front_s = seconds(lambda: segment(sources, CONFIG))
    index = np.linspace(0, count - 1, sample.segments).astype(int)
    on_device = torch.from_numpy(sources).to(DEVICE)
    batch = compose(on_device, segments, index, ENTRY, buffer(len(index), probe.dtype))
    batches = batch.split(at_once(CONFIG, SIDE, DEVICE))
    given = list(probe.activations(batches))
    bare_s = seconds(lambda: list(probe.activations(batches))) / len(index)
    seen = exact.segments(sources, segments.select(index))
    free = replace(exact, probe=Free(given))
    around_s = seconds(lambda: free.segments(sources, segments.select(index)))
    maps = seen.rows(np.arange(len(index)))
    pooled = jittered(seen.pooled, count, 0).cpu().numpy()
    means_s = seconds(lambda: cluster(pooled, segments.image, CONFIG, 0), 1)
    cav_s = seconds(separating(maps, IMAGES), 1)
    gradients_s = seconds(lambda: exact.gradients(sources[:8], 0), 1) / 8 * IMAGES

    rows = [
        _parts.forward(probe, batch, CONFIG, seconds),
        _parts.random_sets(jittered(maps, 940, 4), bare_s),
        _parts.separators(lambda maps: separating(maps, IMAGES), maps, cav_s, seconds),
        *_parts.means(pooled, CONFIG, seconds),
    ]

    slic_s, mask_s, crop_s, each = authors_front(sources, sample)
    forward_s = authors_forward(model, sample.forwards)
    published = KMeans(CONFIG.clusters, n_init=10, random_state=0)
    sgd_s = sgd(maps[: 2 * CONFIG.max_members].float().cpu().numpy(), sample.fits)
    scale = count / len(index)
    again = CONCEPTS * CONFIG.max_members + (CONFIG.random_sets + 1) * CONFIG.max_members
    return [
        Stage(f"SLIC and masks; peer: {sample.images} images", front_s, (slic_s + mask_s) * IMAGES),
        Stage(f"compose, pool and keep; {len(index)} segments, peer: 1 image", around_s * scale,
              crop_s * each * IMAGES),
        Stage("K-means", means_s, once(lambda: published.fit(pooled))),
        Stage(f"separators and scores; peer: {sample.fits} fits", cav_s,
              sgd_s * (CONCEPTS + 2) * CONFIG.random_sets),
        Stage(f"forward; {len(index)} segments, peer: {sample.forwards}", bare_s * count,
              forward_s * (each * IMAGES + again), forward=True),
        Stage("gradients; 8 photos, peer: 1", gradients_s, authors_gradient(model) * IMAGES,
              forward=True),
    ], bare_s, rows  # fmt: skip


def regions(sources: Array, segments: Segments, model: nn.Module, layer: str) -> float:
    """Return the seconds of one class with `--features roi`, from its photos to its scores."""
    roi = Roi(Probe(model, layer, DEVICE, CONFIG.amp), DATA, CONFIG)
    seen: list[Seen] = []

    def run() -> None:
        segment(sources, CONFIG)
        seen[:] = [roi.segments(sources, segments)]
        cluster(seen[0].pooled.cpu().numpy(), segments.image, CONFIG, 0)
        roi.gradients(sources, 0)

    spent = seconds(run, 1)
    return spent + seconds(separating(seen[0].pooled, IMAGES), 1)


def one_class(sources: Array, segments: Segments, sample: Sample) -> list[Row]:
    """Return a row for each stage, then the totals that goals are set for."""
    model, layer = resnet50(sources)
    found, bare_s, parts = stages(sources, segments, model, layer, sample)
    roi_s = regions(sources, segments, model, layer)
    device = DEVICE.type

    def row(what: str, ours: float, peer: float | None, goal: float | None = None) -> Row:
        return faster(what, ours, peer, goal, unit="s", device=device)

    rows = [row(f"one class, {stage.what}", stage.ours, stage.peer or None) for stage in found]
    ours, peer = (sum(getattr(stage, side) for stage in found) for side in ("ours", "peer"))
    other = sum(stage.ours for stage in found if not stage.forward)
    rows += [
        row(f"one class, exact, {len(segments)} segments, the authors' way", ours, peer, 8.0),
        row("one class, all but forwards, a budget", other, 1.0, 1.0),
        row("one class, roi, the authors' way", roi_s, peer, 100.0),
        row("one class, roi, exact", roi_s, ours, 20.0),
    ]
    rate, most = len(segments) / ours, 1 / bare_s
    what = "segments from end to end, bare forward"
    return [*rows, *parts, Row(what, device, rate, most, "1/s", rate / most, 0.8)]


@dataclass(frozen=True)
class Found:
    """What one class holds by float32: its images, segments and clusters."""

    class_id: int
    sources: Array
    segments: Segments
    held_out: Array
    clusters: list[Cluster]


def scores(extractor: Extractor, found: Found) -> Array:
    """Return the TCAV of given clusters, as this extractor sees their members."""
    _, against = extractor.background(found.class_id, extractor.images.load(found.held_out))
    seen = extractor.features.segments(found.sources, found.segments)
    rows = [seen.rows(group.members) for group in found.clusters]
    return np.array([tcav(one, against, extractor.config.cav, 0)[0].mean() for one in rows])


def agreement(folder: Path, classes: int) -> list[Row]:
    """Compare float32's ranking with those of bf16, roi, SGD; a peer is other random sets."""
    data = DataConfig(path=str(folder / "cifar10.zip"), size=32)
    train, _ = open_images(data, folder, 0)
    spec = models.parse_teacher(str(folder / "resnet20_cifar10.safetensors"))
    teacher = models.load_teacher(spec, len(train.classes), folder)

    def extractor(seed: int = 0, **changes: str) -> Extractor:
        config = replace(ExtractConfig(amp="off"), **changes)
        return Extractor(teacher, "", train, data, config, seed, DEVICE)

    base = extractor()
    others = {
        "other random sets": extractor(1), "bf16": extractor(amp="bf16"),
        "roi": extractor(features="roi"), "SGD": extractor(cav="sgd"),
    }  # fmt: skip
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for class_id in range(classes):
        discovery, held_out = base.split(class_id)
        sources = train.load(discovery)
        segments = segment(sources, base.config)
        pooled = base.features.segments(sources, segments).pooled.cpu().numpy()
        groups = cluster(pooled, segments.image, base.config, class_id)
        found = Found(class_id, sources, segments, held_out, groups)
        expected = scores(base, found)
        for name, other in others.items():
            measured[name].append(_alike(expected, scores(other, found)))
    mean = {name: np.mean(values, axis=0) for name, values in measured.items()}
    return [
        Row(f"{what} with float32, {name}, other random sets", DEVICE.type,
            float(values[k]), float(mean["other random sets"][k]), "share",
            float(values[k] / mean["other random sets"][k]), 1.0 if name == "bf16" else None)
        for name, values in mean.items() if name != "other random sets"
        for k, what in enumerate(("TCAV rank correlation", "overlap of the top 5"))
    ]  # fmt: skip


def _alike(one: Array, other: Array) -> tuple[float, float]:
    top = [set(np.argsort(-values, kind="stable")[:5].tolist()) for values in (one, other)]
    return float(spearmanr(one, other)[0]), len(top[0] & top[1]) / len(top[0])


def main() -> None:
    options = arguments(__doc__ or "", data=True).parse_args()
    torch.set_num_threads(1)
    folder = data_folder(options.data)
    photos = np.stack([square(x, SIDE) for x in photographs(folder, IMAGES)])
    sources = photos[np.arange(IMAGES) % len(photos)]
    segments = segment(sources, CONFIG)
    sample = Sample(2, 80, 4, 1) if options.quick else Sample(10, 256, 16, 3)
    rows = composing(sources, segments, 64 if options.quick else 256)
    rows += one_class(sources, segments, sample)
    if folder is not None and (folder / "cifar10.zip").exists():
        rows += agreement(folder, 3 if options.quick else 10)
    report(rows, PACKAGES, options.json)


if __name__ == "__main__":
    main()
