"""The report against hand-computed numbers, a parser, and a workspace written by the library."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from dop_fast import masks, report, runs, workspace
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
from dop_fast.report import charts, facts, gallery, table, tiles
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.types import ClassConcepts, Concept, Patches, Segments
from dop_fast.workspace import Workspace

SIZE = 32
NAMES = ("blue", "<script>alert(1)</script>", "red")
VOID = {"meta", "img", "input", "link", "br", "hr"}
SECTIONS = ("results", "concepts", "stitched", "masks", "training")


class Page(HTMLParser):
    """Ids, outside references and text of a page; refuses tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.scripts = 0
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.references += [str(given[key]) for key in ("src", "href", "srcset") if key in given]
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(given)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Workspace:
    """Return a workspace that holds everything a report shows."""
    made = _empty(tmp_path_factory.mktemp("space"), tiny_images)
    train, _ = open_images(made.data, made.root, 0)
    _write_store(made, train)
    for name, criterion, material, sparsity, seed, top1 in RUNS:
        _write_run(made, name, (criterion, material, sparsity, seed), top1)
    for name, mask in MASKS.items():
        masks.save(made.masks / f"{name}.safetensors", mask)
    return made


@pytest.fixture(scope="module")
def page(space: Workspace) -> Page:
    return Page(report.write(space).read_text(encoding="utf-8"))


RUNS = (
    ("a0", "grasp", "stitched", 0.9, 0, 0.70),
    ("a1", "grasp", "stitched", 0.9, 1, 0.72),
    ("a2", "grasp", "stitched", 0.9, 2, 0.71),
    ("b0", "grasp", "stitched", 0.95, 0, 0.65),
    ("c0", "snip", "images", 0.9, 0, 0.685),
    ("d0", "synflow", "none", 0.9, 0, 0.5),
    ("e0", None, None, 0.0, 0, 0.8125),
)


def _mask(bits: str, criterion: str, sparsity: float = 0.5) -> MaskSet:
    kept = torch.tensor([bit == "1" for bit in bits])
    about = {"criterion": criterion, "material": "images", "sparsity": sparsity, "seed": 0}
    return MaskSet({"conv.weight": kept[:4].reshape(2, 2), "fc.weight": kept[4:]}, about)


MASKS = {
    "first": _mask("11110000", "grasp"),
    "second": _mask("11001100", "snip"),
    "other": _mask("10000000", "grasp", 0.875),
}


def _empty(root: Path, data: Path) -> Workspace:
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


def _write_run(
    made: Workspace, name: str, way: tuple[str | None, str | None, float, int], top1: float
) -> None:
    criterion, material, sparsity, seed = way
    asked = {"criterion": criterion, "material": material, "sparsity": sparsity, "seed": seed}
    settings = TrainConfig(epochs=2, lr=0.05).to_dict()
    folder = made.runs / name
    runs.begin(folder, runs.About("finetune", {"model": "resnet20", **asked}, settings))
    epochs = [{"epoch": i, "top1": top1 * i / 2, "time_s": 1.5} for i in (1, 2)]
    runs.write_metrics(folder, epochs)
    runs.finish(folder, {"top1": top1, "top5": 0.99, "loss": 1.0})


def test_the_page_has_every_section_once(page: Page) -> None:
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)


def test_the_page_needs_nothing_from_outside(space: Workspace, page: Page) -> None:
    html = space.report.read_text(encoding="utf-8")
    assert page.references
    assert all(reference.startswith(("data:image/", "#")) for reference in page.references)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert page.scripts == 1  # the page's own
    assert "<script>alert(1)</script>" in page.text


def test_the_interval_is_students_t_as_computed_by_hand(page: Page) -> None:
    # 0.70, 0.72, 0.71: s = 0.01, t(0.975, 2) = 4.30265, so the half-width is 2.4841 points
    assert table.estimate([0.70, 0.72, 0.71]).half == pytest.approx(0.0248414, abs=1e-6)
    assert "71.00 ± 2.48 n = 3" in page.text


def test_one_value_has_no_interval(page: Page) -> None:
    assert np.isnan(table.estimate([0.685]).half)
    assert "68.50 n = 1" in page.text
    assert "68.50 ±" not in page.text


def test_dense_and_chance_stand_beside_the_pruned(page: Page) -> None:
    assert re.search(r"dense no pruning 81\.25 n = 1", page.text)
    assert re.search(r"chance 33\.33", page.text)


def test_a_criterion_without_data_has_no_material(page: Page) -> None:
    assert "synflow" in page.text
    assert "synflow · none" not in page.text


def test_a_concept_shows_its_score_its_spread_and_its_significance(page: Page) -> None:
    # 41 scores from 0.50 to 0.90: the middle 95 % leave out the lowest and the highest
    assert page.text.count("0.70 TCAV, 0.51 to 0.89") == 6
    assert page.text.count("p < 0.001 · 12 segments") == 3
    assert page.text.count("p = 0.250 · 4 segments not significant") == 3
    assert page.text.count("not significant") == 3


def test_a_film_shows_the_segment_on_grey_above_its_photograph(
    space: Workspace, page: Page
) -> None:
    train, _ = open_images(space.data, space.root, 0)
    uri = str(page.images[0]["src"])
    data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    film = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
    side = gallery.FULL.film.side
    assert film.shape == (2 * side + tiles.GAP, 8 * (side + tiles.GAP) - tiles.GAP, 3)
    photograph = train.load(train.of_class(0)[:1])[0].astype(float)
    quarter, half = SIZE // 2, side // 2
    inside = photograph[:quarter, :quarter].mean((0, 1))
    below = side + tiles.GAP
    assert film[4 : half - 4, 4 : half - 4].mean((0, 1)) == pytest.approx(inside, abs=12)
    assert film[half + 4 : side, half + 4 : side].mean() == pytest.approx(117, abs=4)
    assert film[below + 6 : below + half - 6, 6 : half - 6].mean((0, 1)) == pytest.approx(
        inside, abs=12
    )
    outside = photograph[quarter:, quarter:].mean() * tiles.DIM
    assert film[below + half + 6 :, half + 6 : side].mean() == pytest.approx(outside, abs=12)


def test_stitched_patches_tell_their_coverage(space: Workspace, page: Page) -> None:
    found = gallery.stitching(PatchStore(space.patches))
    assert found is not None
    assert found.coverage == pytest.approx([0.25, 0.5, 0.75, 1.0] * 3)
    assert "= 0.5: 9 of 12 patches reach it" in page.text
    assert "62.5 % of their pixels on average, from 25.0 to 100.0 %" in page.text


def test_the_histogram_counts_every_patch() -> None:
    chart = charts.histogram([0.1, 0.11, 0.52, 1.0], 0.5, "sigma")
    assert re.findall(r"<title>(\d+) with", chart) == ["2", "1", "1"]


def test_masks_of_one_sparsity_are_compared_as_sets() -> None:
    (overlap,) = table.overlaps(MASKS)  # `other` has no mask of its sparsity beside it
    assert overlap.names == ("first", "second")
    assert overlap.jaccard == pytest.approx(np.array([[1, 2 / 6], [2 / 6, 1]]))
    assert overlap.by_chance == pytest.approx(1 / 3)


def test_the_overlap_by_chance_is_what_random_masks_have() -> None:
    draw = torch.rand(2, 200_003, generator=torch.Generator().manual_seed(0)) < 0.1
    random = {name: MaskSet({"w": draw[i]}, {"sparsity": 0.9}) for i, name in enumerate("ab")}
    (overlap,) = table.overlaps(random)
    a, b = (mask.masks["w"] for mask in random.values())
    assert overlap.jaccard[0, 1] == pytest.approx(float((a & b).sum() / (a | b).sum()))
    assert overlap.jaccard[0, 1] == pytest.approx(overlap.by_chance, abs=0.004)


def test_a_layer_that_lost_every_weight_is_marked(page: Page, space: Workspace) -> None:
    html = space.report.read_text(encoding="utf-8")
    assert html.count('<circle class="hollow"') == 2  # fc.weight of `first` and of `other`


def test_settings_off_their_defaults_are_told_with_the_defaults(page: Page) -> None:
    assert "extract clusters 7 25" in page.text
    assert "stitch sigma 0.5 0.75" in page.text
    assert "finetune epochs 2 120" in page.text
    assert "compactness" not in page.text
    assert "data path" not in page.text  # it has its own place


def test_without_its_images_the_page_has_their_numbers_alone(space: Workspace) -> None:
    train, _ = open_images(space.data, space.root, 0)
    store = PatchStore(space.patches)
    for given in (None, replace(train, fingerprint="another")):
        page = Page(report.build(space, store, given, [], {}))
        assert "concept 1" not in str([image["alt"] for image in page.images])
        assert "not at hand" in page.text
        assert page.text.count("0.70 TCAV") == 6


def test_an_empty_workspace_says_what_to_run(tmp_path: Path, tiny_images: Path) -> None:
    page = Page(report.write(_empty(tmp_path, tiny_images)).read_text(encoding="utf-8"))
    order = [page.text.index(step.command) for step in facts.steps(None, [], {})]
    assert order == sorted(order)
    assert len(order) == 5
    assert page.text.count("Nothing here yet") == len(SECTIONS)
    assert page.images == []


def test_a_workspace_whose_images_are_gone_still_has_a_page(tmp_path: Path) -> None:
    page = Page(report.write(_empty(tmp_path, tmp_path / "gone")).read_text(encoding="utf-8"))
    assert "dopfast extract" in page.text


def test_the_same_workspace_gives_the_same_page(space: Workspace) -> None:
    first = report.write(space).read_bytes()
    assert report.write(space).read_bytes() == first


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_thousand_classes_of_photographs_stay_below_30_mb(name: str) -> None:
    photograph = Image.fromarray(load_sample_image(name)).resize((320, 213))
    train = _Photographs(np.asarray(photograph.crop((40, 0, 253, 213)).resize((224, 224))))
    quarters = Segments(  # larger than what SLIC gives at 15 segments
        np.zeros(3, np.int32),
        np.array([[0, 0, 112, 112], [56, 56, 168, 168], [112, 112, 224, 224]], np.int32),
        np.zeros(3, np.int16),
        np.arange(4) * 112 * 14,
        np.full(3 * 112 * 14, 255, np.uint8),
        (224, 224),
    )
    scores = np.linspace(0.01, 0.99, 20)
    concept = Concept(np.arange(3, dtype=np.int32), 0.5, scores, 0.5, 0.9)
    level = gallery.detail(1000)
    found = ClassConcepts(0, quarters, (concept,))
    film = gallery.picture(tiles.film(found, concept, train, 117, level.film))  # type: ignore[arg-type]
    patch = tiles.grid([[tiles.fit(train.pixels, level.film.side)] * level.patches])
    strip = charts.strip(scores, (0.1, 0.9), charts.Span(0, 1, tick=0.5))
    text = 800  # markup and numbers around a picture
    concepts = level.concepts * (len(film.uri) + len(strip) + text)
    assert 1000 * (concepts + len(gallery.picture(patch).uri) + text) < 30e6


class _Photographs:
    """One photograph, as often as it is asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def load(self, index: np.ndarray) -> np.ndarray:
        return np.stack([self.pixels] * len(index))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.612, 0.741], ["60", "65", "70", "75"]),
        ([0.7, 0.7], ["70.0", "70.2"]),
        ([0.0, 1.0], ["0", "20", "40", "60", "80", "100"]),
    ],
)
def test_an_axis_has_round_ticks_around_its_values(values: list[float], ticks: list[str]) -> None:
    axis = charts.axis(values, "top-1", unit=0.01)
    assert [label for _, label in axis.ticks] == ticks
    assert axis.at(min(values)) >= -1e-9  # 0.7 is 0.7000000000000001 in steps of 0.01
    assert axis.at(max(values)) <= 1 + 1e-9


def test_what_a_run_asked_for_is_told_rather_than_the_settings_file(space: Workspace) -> None:
    edited = replace(space, stages={"finetune": {"epochs": 99}})
    used = facts.asked(None, runs.finished_runs(space.runs), {})
    rows = {(row.stage, row.name): row.value for row in facts.changed(edited, used)}
    assert rows["finetune", "epochs"] == "2"
    unused = facts.asked(None, [], {})
    rows = {(row.stage, row.name): row.value for row in facts.changed(edited, unused)}
    assert rows["finetune", "epochs"] == "99"


def test_an_unfinished_run_is_left_out(tmp_path: Path, tiny_images: Path) -> None:
    made = _empty(tmp_path, tiny_images)
    _write_run(made, "half", ("grasp", "images", 0.9, 0), 0.5)
    manifest = made.runs / "half" / runs.MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**content, "finished": None, "result": {}}), encoding="utf-8")
    assert "50.00" not in Page(report.write(made).read_text(encoding="utf-8")).text
