"""A sweep's file, cells, statistics, tables and plots; running is in test_sweep_running.py."""

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dop_fast import sweep as sweeps
from dop_fast.config import DataConfig, ModelConfig, TeacherConfig, TrainConfig
from dop_fast.errors import ConfigError
from dop_fast.report.table import Comparison, estimate
from dop_fast.sweep import anchors, plots, statistics, tables
from dop_fast.sweep.cells import Cell, Row, cells, labels
from dop_fast.sweep.definition import READY, parse
from dop_fast.sweep.results import Results
from dop_fast.workspace import Workspace

SPACE = Workspace(Path(), 0, DataConfig(), TeacherConfig(), ModelConfig("resnet20"), {})
PLAIN: dict[str, Any] = {
    "criteria": ["snip", "random"],
    "materials": ["images", "ones"],
    "sparsities": [0.9, 0.95],
    "seeds": [3, 4],
}
SNIP, ONES, RANDOM = Row("snip", "", "images"), Row("snip", "", "ones"), Row("random")


def made(**changed: Any) -> tuple[Cell, ...]:
    return cells(parse({**PLAIN, **changed}, "test"), SPACE)


def ways(found: tuple[Cell, ...]) -> list[tuple[str, float, int]]:
    return sorted((c.row.label if c.row else "dense", c.sparsity, c.seed) for c in found)


# the file


def test_every_criterion_meets_every_material_sparsity_and_seed_and_dense_every_seed() -> None:
    expected = [("dense", 0.0, seed) for seed in (3, 4)]
    expected += [
        (row, at, seed)
        for row in ("snip · images", "snip · ones", "random")
        for at in (0.9, 0.95)
        for seed in (3, 4)
    ]
    assert ways(made()) == sorted(expected)


def test_a_data_free_criterion_is_done_once_whatever_the_materials_and_their_settings() -> None:
    tables = [
        {"criteria": ["random"], "prune": {"per_class": count}, "sparsities": [0.9]}
        for count in (10, 30)
    ]
    found = cells(parse({"grid": tables, "controls": ["random"], "dense": False}, "t"), SPACE)
    assert ways(found) == [("random", 0.9, seed) for seed in (0, 1, 2)]


def test_every_row_but_controls_has_random_masks_of_its_own_layer_densities_behind_it() -> None:
    found = made(criteria=["snip"], controls=["random", "same-densities"], seeds=1)
    rows = [cell.row.label for cell in found if cell.row and cell.sparsity == 0.9]
    likened = [row for label in ("snip · images", "snip · ones")
               for row in (label, f"same-densities ({label})")]  # fmt: skip
    assert rows == [*likened, "random"]
    masks = {cell.row.label: cell.mask for cell in found if cell.row and cell.sparsity == 0.9}
    assert {cell.like for cell in found if cell.sparsity == 0.9} == {
        "", masks["snip · images"], masks["snip · ones"]
    }  # fmt: skip
    assert len({cell.run for cell in found}) == len(found)


def test_the_comparisons_of_one_seed_are_complete_before_the_next_begins() -> None:
    assert [cell.seed for cell in made()] == sorted(cell.seed for cell in made())


def test_a_count_of_seeds_begins_at_the_seed_given() -> None:
    assert parse({**PLAIN, "seeds": 3}, "t", 5).seeds == (5, 6, 7)


def test_names_tell_the_cell_and_change_with_what_is_computed_but_not_with_speed() -> None:
    def runs(**changed: Any) -> set[str]:
        return {cell.run for cell in made(**changed)}

    assert len(runs()) == len(made()) and runs() == runs()
    assert any(name.startswith("snip-images-0.95-s4-") for name in runs())
    assert runs(finetune={"workers": 4}) == runs(finetune={"epochs": 120}) == runs()
    assert not runs(finetune={"epochs": 9}) & runs()
    assert not runs(model="resnet32") & runs()
    fewer = {c.mask for c in made(prune={"per_class": 5}) if c.row and c.row.material}
    assert not fewer & {cell.mask for cell in made()}
    masks = {cell.mask for cell in made()}
    assert masks == {cell.mask for cell in made(finetune={"epochs": 9})}  # scored once


def test_rows_of_one_name_are_told_apart_by_what_differs() -> None:
    grids = [
        {"criteria": ["grasp"], "materials": ["stitched"], "sparsities": [0.9],
         "prune": {"per_class": count}, "stitch": {"sigma": sigma, "per_class": count}}
        for sigma, count in ((0.5, 30), (0.75, 10))
    ]  # fmt: skip
    found = cells(parse({"grid": grids}, "t"), SPACE)
    named = labels([cell.row for cell in found if cell.row])
    assert sorted(named.values()) == [
        "grasp · stitched (per_class 10, sigma 0.75)",
        "grasp · stitched (per_class 30, sigma 0.5)",
    ]


@pytest.mark.parametrize(
    ("changed", "wrong", "right"),
    [
        ({"critera": []}, "critera", "criteria"),
        ({"criteria": ["snipp"]}, "snipp", "snip"),
        ({"controls": ["randm"]}, "randm", "random"),
        ({"materials": ["imagse"]}, "imagse", "images"),
        ({"baseline": "snip · image"}, "snip · image", "snip · images"),
        ({"prune": {"per_clas": 3}}, "per_clas", "per_class"),
        ({"finetune": {"epoch": 3}}, "epoch", "epochs"),
        ({"stitch": {"sigm": 0.5}}, "sigm", "sigma"),
        ({"grid": [{"materialz": []}]}, "materialz", "materials"),
    ],
)
def test_a_typo_is_refused_and_the_nearest_right_word_named(
    changed: dict[str, Any], wrong: str, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**changed)
    assert wrong in caught.value.message
    assert f"{right!r}" in caught.value.hint


@pytest.mark.parametrize(
    "changed",
    [
        {"sparsities": [1.0]}, {"sparsities": []}, {"sparsities": 0.9}, {"sparsities": ["0.9"]},
        {"sparsities": [math.nan]}, {"materials": []}, {"criteria": [1]}, {"seeds": 0},
        {"seeds": [0.5]}, {"seeds": True}, {"controls": ["snip"]}, {"prune": {"sparsity": 0.5}},
        {"criteria": ["same-densities"]},
        {"prune": 3}, {"grid": 3}, {"grid": [3]}, {"dense": "yes"}, {"model": 3},
        {"anchors": "nowhere"}, {"finetune": {"epochs": 0}}, {"stitch": {"sigma": 2.0}},
        {"criteria": [], "controls": []},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_runs(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        made(**changed)


def test_files_that_come_with_dopfast_are_found_by_name_and_others_by_path(tmp_path: Path) -> None:
    assert len(sweeps.ready()) == 11
    assert sweeps.find("table1.toml") == sweeps.find("table1") == READY / "table1.toml"
    own = tmp_path / "table1.toml"
    own.touch()
    assert sweeps.find(str(own)) == own
    with pytest.raises(ConfigError) as caught:
        sweeps.find("tabel1.toml")
    assert "'table1.toml'" in caught.value.hint


@pytest.mark.parametrize("name", sweeps.ready())
def test_a_ready_made_file_is_whole(name: str) -> None:
    assert cells(sweeps.load(READY / name), SPACE)


# statistics


def test_mean_deviation_and_interval_are_those_of_a_table_of_students_t() -> None:
    found = estimate([0.70, 0.72, 0.77])  # mean 0.73; squares 9, 1, 16 e-4, halved: 13e-4
    assert found.mean == pytest.approx(0.73)
    assert statistics.deviation(found) == pytest.approx(math.sqrt(13e-4))
    half = 4.30265 * math.sqrt(13e-4 / 3)  # t of 2 degrees of freedom, two-sided 5 %
    assert found.interval == pytest.approx((0.73 - half, 0.73 + half), abs=1e-7)


def test_one_seed_has_no_deviation_and_no_interval() -> None:
    found = statistics.over_seeds({7: 0.5})
    assert found is not None and found.n == 1 and found.interval is None
    assert math.isnan(statistics.deviation(found))
    assert tables.text(found) == "50.00 (1)"


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_both_have() -> None:
    ours, theirs = {0: 0.50, 1: 0.70, 2: 0.91, 5: 0.1}, {2: 0.90, 1: 0.68, 0: 0.47, 9: 0.9}
    found = statistics.paired(ours, theirs)  # 3, 2 and 1 points
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(0.02)
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert found.half == pytest.approx(half, abs=1e-7)
    assert statistics.paired({0: 0.5}, {1: 0.5}) is None


def test_nineteen_of_twenty_intervals_hold_the_mean_they_estimate() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        found = estimate(rng.normal(0.7, 0.01, 3))
        assert found.interval is not None
        held += found.interval[0] <= 0.7 <= found.interval[1]
    assert abs(held / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


# tables and plots


def results(**changed: Any) -> Results:
    sweep = replace(parse(PLAIN, "test"), **changed)
    top1 = {
        SNIP: {0.9: {3: 0.50, 4: 0.54}, 0.95: {3: 0.40}},
        ONES: {0.9: {3: 0.47, 4: 0.53}},
        RANDOM: {0.9: {3: 0.3, 4: 0.3}},
    }
    recipe = {
        "model": "resnet20", "classes": 10, "size": 32, "seeds": 2, "epochs": 120,
        "milestones": (0.25, 0.5, 0.75), "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4,
    }  # fmt: skip
    names = labels([SNIP, ONES, RANDOM])
    return Results(sweep, names, top1, {3: 0.6, 4: 0.7}, (0.9, 0.95), recipe, 14, 9)


def entry(found: Results, row: str, sparsity: float) -> dict[str, Any]:
    (one,) = (e for e in tables.entries(found) if (e["row"], e["sparsity"]) == (row, sparsity))
    return one


def test_the_records_hold_hand_computed_figures() -> None:
    one = entry(results(), "snip · ones", 0.9)
    assert (one["n"], one["mean"], one["sd"]) == (2, 50.0, pytest.approx(math.sqrt(18)))
    half = 12.70620 * math.sqrt(18) / math.sqrt(2)  # t of 1 degree of freedom
    assert (one["low"], one["high"]) == pytest.approx((50 - half, 50 + half), abs=1e-3)
    assert one["baseline"] == "snip · images"
    assert one["baseline_difference_mean"] == pytest.approx(-2)
    assert one["baseline_difference_sd"] == pytest.approx(math.sqrt(2))
    assert one["dense_difference_mean"] == pytest.approx(-15)
    alone = entry(results(), "snip · images", 0.95)
    assert (alone["n"], alone["sd"], alone["low"]) == (1, None, None)
    assert alone["baseline"] == ""  # it is the baseline


def test_a_row_may_be_the_baseline_of_all() -> None:
    found = results(baseline="random")
    assert {e["baseline"] for e in tables.entries(found)} == {"", "random"}
    assert entry(found, "snip · images", 0.9)["baseline_difference_mean"] == pytest.approx(22)
    assert entry(results(), "random", 0.9)["baseline"] == ""  # no random on images


def test_a_control_is_held_against_the_row_it_is_like_whatever_the_baseline() -> None:
    control = Row("same-densities", like=ONES)
    found = results(baseline="random")
    top1 = {**found.top1, control: {0.9: {3: 0.46, 4: 0.52}}}
    found = replace(found, top1=top1, names=labels([*found.names, control]))
    one = entry(found, "same-densities (snip · ones)", 0.9)
    assert one["baseline"] == "snip · ones"
    assert one["baseline_difference_mean"] == pytest.approx(-1)


def test_markdown_csv_and_json_tell_the_same() -> None:
    found = results()
    text = tables.as_markdown(found)
    assert "9 of 14 cells are done" in text
    accuracies, differences = text.split("## Paired")
    assert "| snip · ones | snip · images | -2.00 ± 1.41 [-14.71, +10.71] (2) | - |" in differences
    rows = {line.split(" | ")[0]: line for line in accuracies.splitlines()}
    assert "40.00 (1) |" in rows["| snip · images"]
    assert "50.00 ± 4.24 [" in rows["| snip · ones"] and "(2) | - |" in rows["| snip · ones"]
    content = json.loads(json.dumps(tables.as_json(found)))
    assert content["top1"]["snip · images"]["0.95"] == {"3": 0.4}
    read = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert len(read) == len(content["entries"]) == 5
    for row, same in zip(read, content["entries"], strict=True):
        assert row["row"] == same["row"] and float(row["mean"]) == same["mean"]


def test_published_figures_stand_by_our_row_with_their_source_and_a_mark_where_recipes_differ() -> (
    None
):
    found = replace(
        results(anchors="cifar10"), recipe={**results().recipe, "model": "swin", "seeds": 3}
    )
    lines = tables.as_markdown(found).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("| snip · images"))
    assert "SNIP on a Swin" in lines[place + 1] and "78.60" in lines[place + 1]
    assert " ? " in lines[place + 1]  # nothing known differs
    shorter = replace(found, recipe={**found.recipe, "classes": 3})
    text = tables.as_markdown(shorter)
    assert "≠ (1)" in text and "classes 10, ours 3" in text and "Nonac/DDOPaI" in text


def test_the_paper_s_own_recipe_equals_ours_and_another_number_of_items_does_not() -> None:
    grasp = Row("grasp", "", "images", (("per_class", 30),))
    recipe = {**results().recipe, "model": "resnet50", "classes": 1000, "size": 224, "seeds": 1}
    found = replace(results(), recipe=recipe)
    paper = anchors.of_set("imagenet-resnet50")[0]
    assert TrainConfig().epochs == recipe["epochs"]
    assert paper.differences(found.recipe_of(grasp)) == paper.unknown(found.recipe_of(grasp)) == ()
    ten = replace(grasp, extra=())
    assert paper.differences(found.recipe_of(ten)) == ("items 30000, ours 10000",)


def test_every_anchor_has_a_source_and_a_plausible_figure() -> None:
    for rows in anchors.read().values():
        for anchor in rows:
            assert anchor.source and anchor.top1 and anchor.recipe.keys() <= set(anchors.RECIPE)
            assert all(40 < top1 < 100 and 0 < at < 1 for at, top1 in anchor.top1.items())


def test_the_svg_stands_alone_and_shows_every_row_and_interval() -> None:
    comparison = results().comparison
    svg, _ = plots.draw(comparison)
    root = ElementTree.fromstring(svg)
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["snip · images", "snip · ones", "random", "dense"]
    bars = [p for p in root.iter("{http://www.w3.org/2000/svg}path") if p.get("class") == "bar"]
    assert len(bars) == 3  # one seed alone has no interval
    assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", svg))


def test_the_png_shows_what_the_svg_shows() -> None:
    rows = {"a": {0.5: estimate([0.8, 0.8]), 0.9: estimate([0.6, 0.6])}}
    _, image = plots.draw(Comparison((0.5, 0.9), rows, {}))
    svg, _ = plots.draw(Comparison((0.5, 0.9), rows, {}))
    colour = tuple(int(plots._colours()["s0"][i : i + 2], 16) for i in (1, 3, 5))
    pixels = np.asarray(image)
    path = re.search(r'class="line" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    for x, y in ((x0, y0), ((x0 + x1) / 2, (y0 + y1) / 2), (x1, y1)):
        near = pixels[round(2 * y), round(2 * x)].astype(int)
        assert np.abs(near - colour).max() < 60
    assert np.abs(pixels[60, 700].astype(int) - colour).max() > 60  # paper
