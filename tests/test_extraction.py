"""Extraction of whole classes, on images and a teacher made so that the answer is known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ttest_1samp
from sklearn.cluster import KMeans
from torch import nn

from dop_fast.concepts import Extractor, clusters
from dop_fast.concepts.clusters import cluster, popular
from dop_fast.config import DataConfig, ExtractConfig
from dop_fast.errors import DataError
from dop_fast.images import ImageSet, open_images
from dop_fast.types import ClassConcepts, Segments

SIDE, OBJECT, COUNT = 48, 16, 20
COLOURS = {"blue": (30, 50, 220), "green": (30, 200, 60), "red": (220, 40, 30)}
CONFIG = ExtractConfig(
    images=10, tcav_images=10, n_segments=(6, 12), clusters=8, min_members=5, max_members=12,
    random_sets=6, top=2, alpha=0.05, batch_size=50,
)  # fmt: skip


def place(index: int) -> tuple[int, int]:
    """Return where the object of the index-th image of a class lies, top and left."""
    rng = np.random.default_rng(index)
    return tuple(rng.integers(0, SIDE - OBJECT, 2))


def drawn(index: int, colour: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    """Return a square of the class's colour on blotches of grey and brown."""
    coarse = rng.integers(60, 160, (6, 6, 1)) + rng.integers(-20, 20, (6, 6, 3))
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)
    top, left = place(index)
    pixels[top : top + OBJECT, left : left + OBJECT] = colour
    pixels = pixels + rng.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for part, count in (("train", COUNT), ("val", 1)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                drawn(index, colour, rng).save(root / part / name / f"{index:02d}.png")
    (root / "train" / "few").mkdir()
    (root / "val" / "few").mkdir()
    for index in range(7):
        drawn(index, (200, 200, 0), rng).save(root / "train" / "few" / f"{index}.png")
    drawn(0, (200, 200, 0), rng).save(root / "val" / "few" / "0.png")
    return root


class Eye(nn.Module):
    """Sees how blue, green, red and bright each 4 x 4 block is; a class looks at its colour."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.look = nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.AvgPool2d(4))
        self.head = nn.Linear(4, 4, bias=False)
        channels = [[-0.5, -0.5, 1], [-0.5, 1, -0.5], [1, -0.5, -0.5], [0.3, 0.3, 0.3]]
        # classes in the order of their names: blue, few, green, red
        rows = [[20.0, 0, 0, 0], [0, 0, 0, 1], [0, 20.0, 0, 0], [0, 0, 20.0, 0]]
        with torch.no_grad():
            self.colour.weight.copy_(torch.tensor(channels)[..., None, None])
            self.colour.bias.fill_(-0.1)
            self.head.weight.copy_(torch.tensor(rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.look(self.colour(x)).mean(dim=(2, 3)))


def data(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder), size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def train(folder: Path) -> ImageSet:
    return open_images(data(folder), folder, 0)[0]


def extractor(train: ImageSet, folder: Path, **changes: object) -> Extractor:
    config = dataclasses.replace(CONFIG, **changes)
    return Extractor(Eye(), "look", train, data(folder), config, 0, torch.device("cpu"))


def on_object(train: ImageSet, segments: Segments, index: np.ndarray) -> float:
    """Return the share of the segments' pixels that lie on the object."""
    inside = 0
    for i in index:
        number = int(Path(train.names[segments.image[i]]).stem)
        top, left = place(number)
        truth = np.zeros(segments.canvas, bool)
        truth[top : top + OBJECT, left : left + OBJECT] = True
        box = segments.box[i]
        inside += (segments.mask(i) & truth[box[0] : box[2], box[1] : box[3]]).sum()
    return float(inside / segments.area[index].sum())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cav": "sgd"},
        {"negatives": "photos"},
        {"gradient": "logit"},
        {"null": "random"},
        {"features": "roi"},
        {"amp": "bf16"},
    ],
    ids=str,
)
def test_the_most_important_concept_is_the_object(
    train: ImageSet, folder: Path, changes: dict[str, str]
) -> None:
    extraction = extractor(train, folder, **changes)
    for name in COLOURS:
        found = extraction.extract(train.classes.index(name))
        best = found.concepts[0]
        everything = on_object(train, found.segments, np.arange(len(found.segments)))
        assert everything < 0.25
        assert on_object(train, found.segments, best.members) > 3 * everything
        assert best.tcav > 0.9


def test_p_values_test_the_scores_against_one_half(train: ImageSet, folder: Path) -> None:
    extraction = extractor(train, folder, top=8, alpha=1.0)
    for name in COLOURS:
        concepts = extraction.extract(train.classes.index(name)).concepts
        assert concepts[0].p_value == 0 or concepts[0].significant(0.01)
        for concept in concepts:
            runs = concept.tcav_runs
            expected = ttest_1samp(runs, 0.5, alternative="greater").pvalue if runs.std() else 0
            assert concept.p_value == pytest.approx(expected)


def same(one: ClassConcepts, two: ClassConcepts) -> bool:
    columns = ("image", "box", "resolution", "offset", "bits")
    pairs = [(getattr(one.segments, c), getattr(two.segments, c)) for c in columns]
    for a, b in zip(one.concepts, two.concepts, strict=True):
        pairs += [(a.members, b.members), (a.tcav_runs, b.tcav_runs)]
        pairs.append((np.array(a.p_value), np.array(b.p_value)))
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_class_does_not_depend_on_the_classes_before_it(train: ImageSet, folder: Path) -> None:
    blue, green = train.classes.index("blue"), train.classes.index("green")
    both = extractor(train, folder, top=8, alpha=1.0)
    first, second = both.extract(blue), both.extract(green)
    alone = extractor(train, folder, top=8, alpha=1.0)
    assert same(alone.extract(green), second)
    assert same(alone.extract(blue), first)


def test_random_sets_are_made_once_for_a_teacher_and_its_images(
    train: ImageSet, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, made = train.classes.index("red"), []
    make = Extractor._new_random
    monkeypatch.setattr(Extractor, "_new_random", lambda self: made.append(1) or make(self))

    def run(seed: int = 0, layer: str = "look", **changes: object) -> tuple[ClassConcepts, int]:
        made.clear()
        other = extractor(train, folder, top=8, **{"alpha": 1.0, **changes})
        kept = dataclasses.replace(other, cache=tmp_path / "random.zarr", seed=seed, layer=layer)
        return kept.extract(red), len(made)

    without = extractor(train, folder, top=8, alpha=1.0).extract(red)
    (first, count), (second, again) = run(), run()
    assert (count, again) == (1, 0)
    assert same(first, without) and same(second, without)
    assert run(alpha=0.05, cav="sgd")[1] == 0  # no part in the activations
    for changes in ({"seed": 1}, {"layer": "colour"}, {"negatives": "photos"}, {"amp": "bf16"}):
        assert run(**changes)[1] == 1
        assert run(**changes)[1] == 0  # bfloat16 is read as it was stored, too
    chunk = next(path for path in tmp_path.rglob("rows/c/*/*") if path.is_file())
    chunk.write_bytes(bytes(chunk.stat().st_size))
    assert run(amp="bf16")[1] == 1


def test_concepts_index_the_segments_of_the_discovery_images(train: ImageSet, folder: Path) -> None:
    red = train.classes.index("red")
    extraction = extractor(train, folder, top=8, alpha=1.0)
    found, (discovery, held_out) = extraction.extract(red), extraction.split(red)
    assert np.array_equal(np.unique(found.segments.image), discovery)
    assert (np.diff(found.segments.image) >= 0).all()
    assert (train.labels[np.concatenate([discovery, held_out])] == red).all()
    assert not np.intersect1d(discovery, held_out).size
    assert len(found.concepts) > 1
    scores = [concept.tcav for concept in found.concepts]
    assert scores == sorted(scores, reverse=True)
    for concept in found.concepts:
        assert 2 <= len(concept.members) <= CONFIG.max_members
        assert len(np.unique(concept.members)) == len(concept.members)
        assert concept.members.max() < len(found.segments)
        assert concept.tcav == concept.tcav_runs.mean()


@pytest.mark.parametrize(
    ("images", "tcav_images", "expected"),
    [(10, 10, (10, 10)), (5, 3, (5, 3)), (50, 50, (10, 10)), (90, 30, (15, 5)), (4, 99, (4, 16))],
)
def test_too_few_images_are_split_in_proportion(
    train: ImageSet, folder: Path, images: int, tcav_images: int, expected: tuple[int, int]
) -> None:
    extraction = extractor(train, folder, images=images, tcav_images=tcav_images)
    found = extraction.split(train.classes.index("red"))
    assert tuple(map(len, found)) == expected


def test_a_class_with_too_few_images_is_named(train: ImageSet, folder: Path) -> None:
    with pytest.raises(DataError, match=r"few has 7 images .* 8 are needed"):
        extractor(train, folder).extract(train.classes.index("few"))


def test_one_class_alone_is_refused(train: ImageSet, folder: Path) -> None:
    rows = train.of_class(0)
    alone = dataclasses.replace(
        train, classes=train.classes[:1], labels=train.labels[rows], names=train.names[:COUNT]
    )
    with pytest.raises(DataError, match="only one class"):
        extractor(alone, folder).extract(0)


def test_insignificant_concepts_are_left_out(train: ImageSet, folder: Path) -> None:
    red = train.classes.index("red")
    ranked = extractor(train, folder, top=8, alpha=1.0).extract(red).concepts
    assert max(concept.p_value for concept in ranked) > 0.05
    kept = extractor(train, folder, top=8, alpha=0.05).extract(red).concepts
    expected = [concept.tcav for concept in ranked if concept.p_value < 0.05]
    assert [concept.tcav for concept in kept] == expected


def test_the_best_concepts_of_an_indifferent_teacher_are_kept(
    train: ImageSet, folder: Path
) -> None:
    extraction = extractor(train, folder)
    nn.init.zeros_(extraction.teacher.head.weight)
    concepts = extraction.extract(train.classes.index("red")).concepts
    assert [concept.p_value for concept in concepts] == [1.0] * CONFIG.top


def blobs(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return points [m 2] in far-apart blobs, and their distances from the blobs' centres."""
    rng, points = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        points.append(rng.normal(100 * number, 1, (size, 2)))
    apart = [np.linalg.norm(blob - blob.mean(0), axis=1) for blob in points]
    return np.concatenate(points).astype(np.float32), np.concatenate(apart)


def test_a_cluster_keeps_the_members_nearest_to_its_centre() -> None:
    points, apart = blobs([30, 30])
    image = np.tile(np.arange(10), 6)
    config = ExtractConfig(clusters=2, min_members=20, max_members=7)
    for group in cluster(points, image, config, 0):
        inside = np.arange(30) + 30 * (group.members[0] >= 30)
        expected = inside[np.argsort(apart[inside])]
        assert np.array_equal(group.members, expected[:7])
        assert (group.size, group.sources) == (30, 10)
        assert group.cost == pytest.approx(apart[inside].mean(), rel=1e-4)


def test_starts_among_some_of_the_points_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(0).normal(size=(600, 20)).astype(np.float32)
    config, image = ExtractConfig(clusters=10, min_members=20), np.arange(600) % 50
    monkeypatch.setattr(clusters, "SEEDED", 100)
    ours, published = [], []
    for seed in range(8):
        groups = cluster(points, image, config, seed)
        ours.append(sum(group.size * group.cost for group in groups))
        means = KMeans(10, n_init=1, random_state=seed).fit(points)
        published.append(np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1))
        assert sum(group.size for group in groups) == len(points)
    assert np.mean(ours) < 1.005 * np.mean(np.sum(published, axis=1))


def test_small_clusters_and_those_of_one_image_are_left_out() -> None:
    points, _ = blobs([20, 30, 19, 25])
    image = np.concatenate([np.arange(20), np.zeros(30), np.arange(19), np.arange(25)])
    config = ExtractConfig(clusters=4, min_members=20)
    found = cluster(points, image, config, 3)
    assert sorted(group.size for group in found) == [20, 25]
    assert all(group.sources == group.size for group in found)


def test_where_no_cluster_is_popular_the_widest_spread_stand_in() -> None:
    points, _ = blobs([20, 20])
    image = np.repeat([0, 1, 2, 3], 10)
    (found, other) = cluster(points, image, ExtractConfig(clusters=2, min_members=20), 0)
    assert found.sources == other.sources == 2
    identical = np.zeros((40, 3), np.float32)
    assert cluster(identical, image, ExtractConfig(clusters=2, min_members=20), 0)


@pytest.mark.parametrize(
    ("size", "sources", "images", "expected"),
    [
        (40, 21, 1000, True), (40, 20, 1000, False),
        (40, 11, 43, True), (40, 11, 44, False), (40, 10, 30, False),
        (100, 11, 21, True), (100, 11, 22, False), (100, 10, 15, False),
    ],
)  # fmt: skip
def test_popular_has_three_rules(size: int, sources: int, images: int, expected: bool) -> None:
    assert popular(size, sources, images) is expected
