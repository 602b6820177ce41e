"""The report against hand-computed numbers, a parser, and a workspace written by the library."""

import base64
import io
import json
import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report_space
import torch
from PIL import Image
from report_space import HOSTILE, MASKS, SIZE, empty, write_run
from sklearn.datasets import load_sample_image

from dop_fast import report, runs
from dop_fast.images import open_images
from dop_fast.masks import MaskSet
from dop_fast.report import charts, facts, gallery, plots, table, tiles, ways
from dop_fast.stores import PatchStore
from dop_fast.types import ClassConcepts, Concept, Segments
from dop_fast.workspace import Workspace

VOID = {"meta", "img", "input", "link", "br", "hr"}
SECTIONS = ("results", "concepts", "stitched", "masks", "training", "made")


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
    return report_space.full(tmp_path_factory.mktemp("space"), tiny_images)


@pytest.fixture(scope="module")
def page(space: Workspace) -> Page:
    return Page(report.write(space).read_text(encoding="utf-8"))


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
    assert " ".join(HOSTILE.split()) in page.text


def test_ways_that_were_trained_alike_are_not_said_to_differ(page: Page) -> None:
    assert "trained alike" not in page.text


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
    # 41 scores from 0.50 to 0.90, 0.01 apart: s = 0.1198, t(0.975, 40) = 2.0211, half = 0.0378
    assert page.text.count("TCAV 0.70 ± 0.04") == 6
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


def test_all_films_of_a_page_are_equally_wide(page: Page) -> None:
    films = [image for image in page.images if "concept" in str(image["alt"])]
    assert len(films) == 6  # of 12 segments and of 4
    assert len({image["width"] for image in films}) == 1


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
    (overlap,) = table.overlaps(MASKS, dict(zip(MASKS, MASKS, strict=True)))
    assert overlap.names == ("first", "second")  # `other` has none of its sparsity beside it
    assert overlap.jaccard == pytest.approx(np.array([[1, 2 / 6], [2 / 6, 1]]))
    assert overlap.by_chance == pytest.approx(1 / 3)


def test_the_overlap_by_chance_is_what_random_masks_have() -> None:
    draw = torch.rand(2, 200_003, generator=torch.Generator().manual_seed(0)) < 0.1
    random = {name: MaskSet({"w": draw[i]}, {"sparsity": 0.9}) for i, name in enumerate("ab")}
    (overlap,) = table.overlaps(random, {"a": "a", "b": "b"})
    a, b = (mask.masks["w"] for mask in random.values())
    assert overlap.jaccard[0, 1] == pytest.approx(float((a & b).sum() / (a | b).sum()))
    assert overlap.jaccard[0, 1] == pytest.approx(overlap.by_chance, abs=0.004)


def test_a_layer_that_lost_every_weight_is_marked(page: Page, space: Workspace) -> None:
    html = space.report.read_text(encoding="utf-8")
    assert html.count('<circle class="hollow"') == 2  # fc.weight of `first` and of `other`


def test_settings_off_their_defaults_are_told_with_the_defaults(space: Workspace) -> None:
    store, done = PatchStore(space.patches), runs.finished_runs(space.runs)
    rows = facts.settings(space, facts.used(store, done, MASKS))
    changed = {(row.stage, row.name): (row.value, row.default) for row in rows if row.changed}
    assert changed["extract", "clusters"] == ("7", "25")
    assert changed["stitch", "sigma"] == ("0.5", "0.75")
    assert changed["finetune", "epochs"] == ("2", "120")
    assert ("extract", "compactness") in {(row.stage, row.name) for row in rows}
    assert ("data", "path") not in {(row.stage, row.name) for row in rows}  # it has its own place


def test_of_many_values_of_a_setting_some_are_shown(space: Workspace) -> None:
    asked = [({"epochs": epochs}, {}) for epochs in range(1, 10)]
    rows = facts.settings(space, {"finetune": asked})
    assert "1 / 2 / 3 / 4 / 5 and 4 more" in {row.value for row in rows}


def test_without_its_images_the_page_has_their_numbers_alone(space: Workspace) -> None:
    train, _ = open_images(space.data, space.root, 0)
    store = PatchStore(space.patches)
    for given in (None, replace(train, fingerprint="another")):
        page = Page("".join(report.build(space, store, given, [], {})))
        assert "concept 1" not in str([image["alt"] for image in page.images])
        assert "not at hand" in page.text
        assert page.text.count("TCAV 0.70") == 6


def test_an_empty_workspace_says_what_to_run(tmp_path: Path, tiny_images: Path) -> None:
    page = Page(report.write(empty(tmp_path, tiny_images)).read_text(encoding="utf-8"))
    order = [page.text.index(step.command) for step in facts.steps(None, [], {})]
    assert order == sorted(order)
    assert len(order) == 5
    assert page.text.count("Nothing here yet") == len(SECTIONS) - 1  # settings there always are
    assert page.images == []


def test_a_workspace_whose_images_are_gone_still_has_a_page(tmp_path: Path) -> None:
    page = Page(report.write(empty(tmp_path, tmp_path / "gone")).read_text(encoding="utf-8"))
    assert "dopfast extract" in page.text


def test_the_same_workspace_gives_the_same_page(space: Workspace) -> None:
    first = report.write(space).read_bytes()
    assert report.write(space).read_bytes() == first


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_a_thousand_classes_of_photographs_stay_below_30_mb(name: str) -> None:
    photograph = Image.fromarray(load_sample_image(name)).resize((320, 213))
    train = _Photographs(photograph.crop((40, 0, 253, 213)))
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
    patch = tiles.grid([[tiles.fit(train.load([0])[0], level.film.side)] * level.patches])
    strip = charts.strip(scores, (0.1, 0.9), charts.Span(0, 1, tick=0.5))
    text = 800  # markup and numbers around a picture
    concepts = level.concepts * (len(film.uri) + len(strip) + text)
    assert 1000 * (concepts + len(gallery.picture(patch).uri) + text) < 30e6


@dataclass(frozen=True)
class _Photographs:
    """One photograph, as often as it is asked for."""

    photograph: Image.Image
    size: int = 224

    def load(self, index: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(self.photograph.resize((self.size, self.size)))] * len(index))


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


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(3, "1 2 3"), (12, "1 5 10 12"), (20, "1 5 10 15 20"), (162, "1 50 100 162")],
)
def test_an_axis_of_epochs_ends_with_the_last_and_labels_keep_apart(last: int, ticks: str) -> None:
    axis = charts.whole_axis(1, last, "epoch")
    assert " ".join(label for _, label in axis.ticks) == ticks


def test_no_label_touches_the_one_before_it() -> None:
    near = charts.Axis(0, 1, [(0, "0.00"), (0.01, "0.01"), (1, "1.00")])
    chart = charts.lines([charts.Line("a", "s0", [0, 1], [0, 1])], near, near, "")
    assert re.findall(r'class="x" [^>]*>([\d.]+)<', chart) == ["0.00", "1.00"]


def test_what_a_run_asked_for_is_told_rather_than_the_settings_file(space: Workspace) -> None:
    edited = replace(space, stages={"finetune": {"epochs": 99}})
    done = runs.finished_runs(space.runs)
    for given, epochs in ((done, "2"), ([], "99")):
        rows = facts.settings(edited, facts.used(None, given, {}))
        assert {(row.stage, row.name): row.value for row in rows}["finetune", "epochs"] == epochs


def test_an_unfinished_run_is_named_and_left_out(tmp_path: Path, tiny_images: Path) -> None:
    made = empty(tmp_path, tiny_images)
    write_run(made, "half", ("grasp", "images", 0.9, 0), 0.5)
    manifest = made.runs / "half" / runs.MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**content, "finished": None, "result": {}}), encoding="utf-8")
    page = Page(report.write(made).read_text(encoding="utf-8"))
    assert "50.00" not in page.text
    assert "Left out, not finished: half." in page.text


def test_effective_sparsity_counts_what_is_kept_without_a_path(page: Page) -> None:
    # 4 of 8 weights are kept, 2 of them on a path; there are 16 parameters
    wanted = (
        "first 4 of 8 weights kept, sparsity 50.00 %, 25.00 % of all parameters, effective 75.00 %"
    )
    assert wanted in page.text


def test_masks_are_compared_where_their_initial_weights_are_the_same() -> None:
    masks = {
        name: MaskSet({"w": torch.tensor(bits)}, {"sparsity": 0.5, "init": init})
        for name, init, bits in (
            ("a0", "0", [True, True, False, False]), ("b0", "0", [True, True, False, False]),
            ("a1", "1", [False, False, True, True]), ("b1", "1", [True, False, True, False]),
        )
    }  # fmt: skip
    (overlap,) = table.overlaps(masks, {name: name[0] for name in masks})
    assert overlap.names == ("a", "b")
    assert overlap.n == 2
    assert overlap.jaccard[0, 1] == pytest.approx((1 + 1 / 3) / 2)


def test_runs_that_differ_in_their_settings_are_no_seeds_of_one_way(
    tmp_path: Path, tiny_images: Path
) -> None:
    made = empty(tmp_path, tiny_images)
    for seed, epochs in ((0, 2), (1, 2), (0, 3)):
        way = ("grasp", "images", 0.9, seed)
        write_run(made, f"{epochs}-{seed}", way, 0.5 + 0.1 * epochs, epochs=epochs)
    done = runs.finished_runs(made.runs)
    named = ways.of_runs(done, {})
    rows = table.compare([table.result(run, named[run.name]) for run in done]).rows
    assert {name: row[0.9].n for name, row in rows.items()} == {
        "grasp · images (epochs 2)": 2,
        "grasp · images (epochs 3)": 1,
    }


def test_ways_that_were_not_trained_alike_are_not_compared_in_silence(
    tmp_path: Path, tiny_images: Path
) -> None:
    made = empty(tmp_path, tiny_images)
    write_run(made, "long", ("grasp", "images", 0.9, 0), 0.7, epochs=3)
    write_run(made, "short", ("snip", "images", 0.9, 0), 0.6, epochs=2)
    text = Page(report.write(made).read_text(encoding="utf-8")).text
    assert "Not all were trained alike: epochs 3 / 2." in text


def test_a_way_has_the_colour_of_its_material_whatever_the_criterion() -> None:
    look = plots.styles_of_ways(["snip · images", "grasp · images", "grasp · patches", "random"])
    assert look["snip · images"] == look["grasp · images"]
    assert len(set(look.values())) == 3
    assert plots.families(look) == {
        "grasp": ["grasp · images", "grasp · patches"],
        "snip": ["snip · images"],
        "without data": ["random"],
    }
