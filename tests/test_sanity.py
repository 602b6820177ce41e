"""Sanity checks against what is known by construction, by simulation and by hand."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from dop_fast import criteria, models, pipeline, report, sanity, workspace
from dop_fast.cli.main import dopfast
from dop_fast.config import ExtractConfig, PruneConfig, SanityConfig, StitchConfig
from dop_fast.errors import ConfigError, DataError, StoreError
from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.patches.material import gather
from dop_fast.report import reliability
from dop_fast.sanity import controls
from dop_fast.sanity.agreement import overlap
from dop_fast.sanity.halves import halve
from dop_fast.sanity.reliability import ladder, regrouped
from dop_fast.types import Batches, Loss, Scores
from dop_fast.workspace import Workspace

CPU = torch.device("cpu")
EXTRACT = ExtractConfig(
    images=8, tcav_images=4, n_segments=(6, 12), clusters=4, min_members=4, max_members=8,
    random_sets=4,
)  # fmt: skip
SMALL = SanityConfig(
    criterion=("snip",), start=6, budget=24, splits=2, per_class=2, batch_size=6, sparsity=0.5
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Workspace:
    """Return a workspace with concepts of an untrained teacher, and stitched patches."""
    space, _, _ = pipeline.init(
        tmp_path_factory.mktemp("space"), data=str(tiny_images), size=32, teacher="resnet20",
        model="", seed=0, force=False,
    )  # fmt: skip
    models.save_weights(space.teacher_weights, models.build("resnet20", 3, 9), {"model": "r"})
    pipeline.extract(space, EXTRACT, 0, CPU)
    pipeline.stitch(space, StitchConfig(sigma=0.5, per_class=4), 0)
    return space


@pytest.fixture
def space(made: Workspace, tmp_path: Path) -> Workspace:
    """Return a copy that a test may change."""
    shutil.copytree(made.root, tmp_path / "space")
    return workspace.load(tmp_path / "space")


def of(space: Workspace, **changes: object) -> sanity.Study:
    return sanity.open_study(space, replace(SMALL, **changes), 0, CPU)  # type: ignore[arg-type]


class Linear:
    """A criterion whose score is one signal plus noise of each item, so N / (N + c) is known."""

    NEEDS_DATA = True

    def __init__(self, c: float, stop_at: int = 10**9) -> None:
        self.c, self.calls, self.stop_at = c, 0, stop_at

    def score(
        self, model: nn.Module, batches: Batches, loss: Loss, seed: int, **knobs: object
    ) -> Scores:
        self.calls += 1
        if self.calls > self.stop_at:
            raise KeyboardInterrupt
        weights = prunable(model)
        signal = self._draw(weights, 0)
        items = [image for images, _ in batches for image in images]
        noise = [self._draw(weights, self._seed(image)) for image in items]
        share = self.c**0.5 / len(items)
        return {k: signal[k] + share * torch.stack([n[k] for n in noise]).sum(0) for k in weights}

    def _seed(self, image: Tensor) -> int:
        digest = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
        return int.from_bytes(digest[:6], "little")

    def _draw(self, weights: dict[str, nn.Parameter], seed: int) -> Scores:
        generator = torch.Generator().manual_seed(seed)
        return {k: torch.randn(w.shape, generator=generator) for k, w in weights.items()}


def use(monkeypatch: pytest.MonkeyPatch, fake: Linear) -> Linear:
    monkeypatch.setattr(criteria, "load", lambda name: fake)
    return fake


def test_crops_of_items_are_studied_beside_whole_ones(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(c=9.0))  # its score follows from the pixels
    found = {}
    for augment in ("none", "published"):
        study = of(space, material=("patches",), augment=augment, budget=12)
        sanity.measure(study)
        found[augment] = sanity.read(study.path)["reliability"]
    assert len({json.dumps(cells["snip/patches/6/0"]["halves"]) for cells in found.values()}) == 2
    titles = [study.title for study in reliability.studies(space.sanity)]
    assert [title.endswith(", published crops") for title in titles] == [False, True]


def test_the_split_half_cosine_of_a_linear_criterion_is_n_over_n_plus_c(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(c=9.0))
    study = of(space, material=("images",), budget=36)
    sanity.measure(study)
    cells = sanity.read(study.path)["reliability"].values()
    assert sorted(cell["items"] for cell in cells) == [6, 6, 12, 12]
    for cell in cells:
        n = cell["items"]
        assert cell["halves"]["cosine"] == pytest.approx(n / (n + 9), abs=0.008)  # 270,000 weights
        assert cell["halves"]["cosine_layers"] == pytest.approx(0, abs=0.001)
        assert cell["chunks"] == n // 6
        if n > 6:  # one chunk alone cannot be cut otherwise; a sum does not depend on the cut
            assert cell["regrouped"]["cosine"] == pytest.approx(1, abs=1e-5)
        else:
            assert cell["regrouped"] is None
    (curve,) = reliability.curves(sanity.read(study.path))
    assert curve.needed.items == pytest.approx(9 * 9, rel=0.05)
    assert not curve.needed.bad and not curve.needed.measured and not curve.needed.far


def test_a_study_goes_on_where_it_was_interrupted(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cells() -> dict[str, object]:
        found = sanity.read(of(space).path)["reliability"]
        return {key: {k: v for k, v in row.items() if k != "time_s"} for key, row in found.items()}

    study = of(space, material=("images", "stitched"), budget=12)
    use(monkeypatch, Linear(4.0))
    sanity.measure(study)
    expected = cells()
    assert len(expected) == 2 * 2  # materials, splits
    again = use(monkeypatch, Linear(4.0))
    sanity.measure(study)
    assert again.calls == 0
    use(monkeypatch, Linear(4.0, stop_at=5))
    with pytest.raises(KeyboardInterrupt):
        sanity.measure(study, force=True)
    assert len(cells()) == 2
    rest = use(monkeypatch, Linear(4.0))
    sanity.measure(study)
    assert cells() == expected
    assert rest.calls == 2 * 2  # two cells were there; the score that was under way is lost


def test_force_measures_again_what_is_asked_for_and_keeps_the_rest(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, one = of(space, material=("images", "stitched")), of(space, material=("images",))
    use(monkeypatch, Linear(4.0))
    sanity.measure(both)
    before = sanity.read(both.path)["reliability"]
    again = use(monkeypatch, Linear(5.0))
    sanity.measure(one, force=True)
    after = sanity.read(both.path)["reliability"]
    assert after.keys() == before.keys() and again.calls
    assert {key.split("/")[1] for key in after if after[key] != before[key]} == {"images"}
    both.path.write_text("{")
    sanity.measure(one, force=True)  # over a damaged file too
    assert {key.split("/")[1] for key in sanity.read(both.path)["reliability"]} == {"images"}


def test_more_splits_or_a_larger_budget_add_to_what_is_there(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(4.0))
    sanity.measure(of(space, material=("images",), splits=1, budget=12))
    first = sanity.read(of(space).path)["reliability"]
    sanity.measure(of(space, material=("images",), splits=2, budget=24))
    more = sanity.read(of(space).path)["reliability"]
    assert len(first) == 1 and len(more) == 4
    assert first.items() <= more.items()


def test_other_stitched_patches_are_measured_again_and_images_are_not(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(4.0))
    kinds = ("images", "stitched")
    sanity.measure(of(space, material=kinds, splits=1, budget=12))
    pipeline.stitch(space, StitchConfig(sigma=0.3, per_class=4), 0, force=True)
    again = use(monkeypatch, Linear(4.0))
    sanity.measure(of(space, material=kinds, splits=1, budget=12))
    assert again.calls == 2


def test_results_of_other_settings_are_refused_and_kept(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(4.0))
    study = of(space, material=("images",))
    sanity.measure(study)
    before = study.path.read_bytes()
    with pytest.raises(StoreError, match="another batch_size"):
        sanity.measure(of(space, material=("images",), batch_size=3))
    assert study.path.read_bytes() == before


def test_halves_share_no_photograph_and_lose_none(made: Workspace) -> None:
    study = of(made)
    assert study.store is not None
    first, second = halve(study.train, study.store, 0, stitched=4)
    assert first.store is not None and second.store is not None
    for class_id in range(3):
        a, b = (half.images.of_class(class_id) for half in (first, second))
        assert sorted([*a, *b]) == study.train.of_class(class_id).tolist()
        assert abs(len(a) - len(b)) <= 1
        whole = study.store.concepts(class_id)
        parts = [half.store.concepts(class_id) for half in (first, second) if half.store]
        for part, own in zip(parts, (a, b), strict=True):
            assert set(part.segments.image) <= set(own)
            for concept in part.concepts:  # members still index their own segments
                assert concept.members.max(initial=0) < len(part.segments)
        assert sum(len(part.segments) for part in parts) == len(whole.segments)
        for rank, concept in enumerate(whole.concepts):
            seen = [
                (int(part.segments.image[i]), tuple(part.segments.box[i]))
                for part in parts
                for i in part.concepts[rank].members
            ]
            segments = whole.segments
            assert sorted(seen) == sorted(
                (int(segments.image[i]), tuple(segments.box[i])) for i in concept.members
            )


def test_a_half_is_stitched_of_its_own_photographs(made: Workspace) -> None:
    study = of(made)
    for half in halve(study.train, study.store, 1, stitched=4):
        assert half.store is not None
        patches = half.store.stitched()
        for pixels, valid, label in zip(patches.pixels, patches.valid, patches.label, strict=True):
            own = study.train.load(half.images.of_class(int(label)))
            shown = (own == pixels).all(-1).any(0)  # each pixel is one of theirs, in its place
            assert valid.any() and shown[valid].all()


def test_a_larger_cell_holds_the_items_of_a_smaller_one(made: Workspace) -> None:
    study = of(made)
    for half in halve(study.train, study.store, 0, stitched=4):
        for kind in ("images", "patches", "stitched"):
            shown = [
                {image.numpy().tobytes() for images, _ in batches for image in images}
                for per_class in (1, 2)
                for batches in [
                    gather(
                        kind, half.store, half.images, made.data,
                        PruneConfig(per_class=per_class, batch_size=4), seed=0, device=CPU,
                    )
                ]
            ]  # fmt: skip
            assert shown[0] < shown[1]


def test_regrouping_keeps_items_and_changes_chunks(made: Workspace) -> None:
    config = PruneConfig(per_class=4, batch_size=4)
    material = gather("images", None, of(made).train, made.data, config, seed=0, device=CPU)
    again = regrouped(material, 0)
    assert [len(chunk) for chunk in again.chunks] == [len(chunk) for chunk in material.chunks]
    assert sorted(np.concatenate(again.chunks)) == list(range(12))
    assert {frozenset(chunk) for chunk in again.chunks} != {frozenset(c) for c in material.chunks}


def test_permuted_labels_are_the_same_images_and_as_many_of_each_class(made: Workspace) -> None:
    config = PruneConfig(per_class=4, batch_size=4)
    material = gather("images", None, of(made).train, made.data, config, seed=0, device=CPU)
    images, labels = (torch.cat(part) for part in zip(*material, strict=True))
    others, permuted = (
        torch.cat(part) for part in zip(*controls.permuted(material, 4, 0), strict=True)
    )
    assert torch.equal(images, others)
    assert torch.equal(permuted.bincount(), labels.bincount())
    assert not torch.equal(permuted, labels)


def test_sizes_double_up_to_the_budget_and_are_equal_in_every_class() -> None:
    assert ladder(100, 800, 10) == (10, 20, 40)
    assert ladder(100, 799, 10) == (10, 20)
    assert ladder(100, 4000, 1000) == (1, 2)
    with pytest.raises(ConfigError, match="budget of 150 items is too small") as caught:
        ladder(100, 150, 10)
    assert "--budget 200" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"criterion": ("snp",)}, "no criterion 'snp'", "snip"),
        ({"criterion": ("random",)}, "random needs no data", "leave it out"),
        ({"criterion": ()}, "no criterion", "--criterion"),
        ({"material": ("stiched",)}, "no material 'stiched'", "stitched"),
        ({"material": ("ones",)}, "all the same", "leave them out"),
    ],
)
def test_bad_names_are_refused_before_anything_is_computed(
    made: Workspace, changes: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        of(made, **changes)
    assert hint in caught.value.hint


def test_material_that_runs_out_ends_its_curve_and_says_so(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Linear(4.0))
    short = sanity.measure(of(space, material=("images",), budget=100, splits=1))
    assert short == [
        "images ran out below 24 items a half in split 0: fewer images than 8, so shown "
        "repeatedly: blue (6), green (6), red (6)"
    ]
    assert len(sanity.read(of(space).path)["reliability"]) == 2
    with pytest.raises(DataError, match="half of the photographs is not enough") as caught:
        sanity.measure(of(space, material=("images",), start=60, budget=200))
    assert "--start 30" in caught.value.hint


def test_shuffling_keeps_the_layers_and_nothing_else() -> None:
    drawn = {name: torch.rand(60, 5, generator=torch.Generator().manual_seed(0)) for name in "ab"}
    mask = MaskSet({name: score > 0.7 for name, score in drawn.items()})
    other = controls.shuffled(mask, 0)
    assert [row.kept for row in other.layers()] == [row.kept for row in mask.layers()]
    assert overlap(mask, other).jaccard < 0.9
    assert overlap(mask, other).moved == 0


def invoke(space: Workspace, *arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(dopfast, ["sanity", "-w", str(space.root), "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_command_measures_compares_and_trains_and_the_report_shows_it(
    space: Workspace,
) -> None:
    text = (space.root / "dopfast.toml").read_text(encoding="utf-8")
    assert "[sanity]" in text
    given = (
        '[sanity]\ncriterion = ["snip"]\nstart = 6\nbudget = 24\nsplits = 2\nper_class = 4\n'
        "batch_size = 6\n"
    )
    tune = "[finetune]\nepochs = 1\nbatch_size = 12\n"
    text = text.replace("[sanity]\n", given).replace("[finetune]\n", tune)
    (space.root / "dopfast.toml").write_text(text, encoding="utf-8")
    found = invoke(space, "--finetune", "--material", "images")
    rows = found["controls"]
    assert isinstance(rows, dict)
    overlaps = {key.split("/")[2]: row for key, row in rows.items()}
    assert overlaps["original"]["jaccard"] == 1
    assert overlaps["shuffled"]["jaccard"] == pytest.approx(
        overlaps["shuffled"]["chance_layers"], abs=0.03
    )
    assert overlaps["random"]["jaccard"] == pytest.approx(0.1 / 1.9, abs=0.01)
    assert overlaps["re-initialised"]["jaccard"] == 1  # the same mask, on other weights
    assert all("top1" in overlaps[name] for name in controls.TRAINED)
    again = invoke(space, "--finetune", "--material", "images")
    assert again["controls"] == rows and again["reliability"] == found["reliability"]
    more = invoke(space)
    assert set(more["materials"]) == {  # type: ignore[call-overload]
        "snip/images/patches", "snip/images/stitched", "snip/patches/stitched",
    }  # fmt: skip
    assert more["controls"]["snip/stitched/other items"]["jaccard"] < 0.9  # type: ignore[index]
    assert more["controls"]["snip/images/shuffled"] == overlaps["shuffled"]  # type: ignore[index]
    page = report.write(space).read_text(encoding="utf-8")
    assert 'id="reliability"' in page
    assert "snip: cosine of the scores" in page and "permuted labels" in page
    assert not list(space.root.rglob("*.partial"))


def test_a_foreign_file_of_results_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": "dopfast.run"}'):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        with pytest.raises(StoreError, match=r"x\.json"):
            sanity.read(tmp_path / "x.json")


def test_a_workspace_without_a_study_has_no_section(made: Workspace) -> None:
    assert reliability.studies(SimpleNamespace(glob=lambda _: [])) == []  # type: ignore[arg-type]
    assert 'id="reliability"' not in "".join(report.build(made, None, None, [], {}))
