"""`dopfast prune` as a whole: rounds, variants, both definitions of sparsity, going on."""

import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from dop_fast import criteria, masks, models, pipeline, residual, sanity, sweep, training
from dop_fast.cli.main import dopfast
from dop_fast.config import ModelConfig, PruneConfig, SanityConfig, TrainConfig
from dop_fast.errors import ConfigError, ModelError, StoreError
from dop_fast.patches import material
from dop_fast.sweep import definition
from dop_fast.workspace import Workspace

CPU = torch.device("cpu")
ITERATED = PruneConfig(criterion="iter-snip", material="images", per_class=2, rounds=4)


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Workspace:
    made, _, _ = pipeline.init(
        tmp_path / "space", data=str(tiny_images), size=16, teacher="resnet20", model="", seed=0,
        force=False,
    )  # fmt: skip
    return made


def stopping_after(count: int) -> Any:
    """Return a progress bar that is interrupted between two rounds."""

    def track(items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            yield item
            if number == count:
                raise KeyboardInterrupt

    return track


@pytest.mark.parametrize("criterion", ["force", "iter-snip", "synflow"])
def test_an_interrupted_pruning_goes_on_to_the_same_bytes(
    space: Workspace, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(criterion=criterion, material="images", per_class=2, rounds=4)
    path, _, _ = pipeline.prune(space, config, 0, CPU)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(space, config, 0, CPU, track=stopping_after(2))
    assert [left.name for left in space.masks.iterdir()] == [f"{path.name}.rounds"]

    taken = []
    module = criteria.load(criterion)
    score = module.score

    def counted(model: Any, batches: Any, loss: Any, seed: int, *, mask: Any = None,
                image: Any = (), variant: str = "clean") -> Any:  # fmt: skip
        taken.append(seed)
        more = {"image": image} if criterion == "synflow" else {}
        return score(model, batches, loss, seed, mask=mask, variant=variant, **more)

    monkeypatch.setattr(module, "score", counted)
    pipeline.prune(space, config, 0, CPU)
    assert len(taken) == 2
    assert path.read_bytes() == whole
    assert [left.name for left in space.masks.iterdir()] == [path.name]

    path.with_name(f"{path.name}.rounds").write_bytes(whole)  # killed before it was removed
    pipeline.prune(space, config, 0, CPU)
    assert [left.name for left in space.masks.iterdir()] == [path.name]


def test_every_round_is_shown_with_the_chunks_that_it_reads(space: Workspace) -> None:
    seen: list[str] = []

    def track(items: Iterable[Any], label: Any, total: int) -> Iterator[Any]:
        for item in items:
            seen.append(f"{label(item)}: {item} of {total}")
            yield item

    path, kept, _ = pipeline.prune(space, replace(ITERATED, batch_size=2), 0, CPU, track=track)
    assert kept.about["rounds"] == 4
    assert seen == [f"{path.stem}, round {1 + i // 3} of 4: {i} of 12" for i in range(12)]


def test_masks_of_other_rules_have_other_names(space: Workspace) -> None:
    configs = [
        ITERATED,
        PruneConfig(criterion="snip", material="images", per_class=2),
        PruneConfig(criterion="snip", material="images", per_class=2, variant="published"),
        PruneConfig(criterion="grasp", material="images", per_class=2, variant="published",
                    count="published"),
        PruneConfig(criterion="magnitude", definition="all"),
        PruneConfig(criterion="magnitude", min_layer_density=0.01),
    ]  # fmt: skip
    names = [pipeline.prune(space, config, 0, CPU)[0].stem for config in configs]
    assert names == [
        "iter-snip-4r-images-0.9-s0", "snip-images-0.9-s0", "snip-published-images-0.9-s0",
        "grasp-published-published-images-0.9-s0", "magnitude-0.9all-s0",
        "magnitude-floor0.01-0.9-s0",
    ]  # fmt: skip
    total = masks.load(space.masks / f"{names[0]}.safetensors").total
    kept = [masks.load(space.masks / f"{name}.safetensors").kept for name in names]
    exact = round(total * (1 - 0.9))
    assert kept[:4] == [exact, exact, exact, total - int(total * 0.9) + 1]


def test_of_all_parameters_exactly_the_share_asked_is_removed(space: Workspace) -> None:
    config = PruneConfig(criterion="magnitude", definition="all", sparsity=0.9)
    _, kept, model = pipeline.prune(space, config, 0, CPU)
    everything = sum(value.numel() for value in model.parameters())
    assert kept.total - kept.kept == round(0.9 * everything)
    with pytest.raises(ConfigError, match="of all"):
        pipeline.prune(
            space, PruneConfig(criterion="random", definition="all", sparsity=0.999), 0, CPU
        )


def test_a_published_count_needs_published_code(space: Workspace) -> None:
    with pytest.raises(ConfigError) as refused:
        pipeline.prune(space, PruneConfig(criterion="snip", count="published"), 0, CPU)
    assert "--variant published" in refused.value.hint


def test_a_criterion_without_published_code_says_so_before_it_reads_data(space: Workspace) -> None:
    with pytest.raises(ConfigError, match="magnitude has no variant 'published'"):
        pipeline.prune(space, PruneConfig(criterion="magnitude", variant="published"), 0, CPU)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"criterion": "random", "rounds": 3}, "one round"),
        ({"criterion": "smart-ratio", "sparsity": 0.9999}, "SmartRatio keeps 30%"),
        ({"criterion": "grasp", "like": "mine"}, "grasp takes no densities"),
        ({"criterion": "same-densities"}, "needs a mask to be like"),
    ],
)
def test_what_a_criterion_cannot_do_is_refused_before_data_are_read(
    space: Workspace, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "gather", None)
    with pytest.raises(ConfigError, match=message):
        pipeline.prune(space, PruneConfig(**asked), 0, CPU)


def test_a_network_without_branches_is_refused_for_sbp_sr_by_all_before_they_begin(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "gather", None)
    flat = replace(space, model=ModelConfig("vgg19_cifar"))
    grid = {"criteria": ["snip", "sbp-sr"], "sparsities": [0.9], "materials": ["images"]}
    book = sweep.Book(definition.parse(grid, "mine"), flat)
    for begin in (
        lambda: pipeline.prune(flat, PruneConfig(criterion="sbp-sr"), 0, CPU),
        lambda: next(sweep.run(book, CPU)),
        lambda: sanity.open_study(flat, SanityConfig(criterion=("snip", "sbp-sr")), 0, CPU),
    ):
        with pytest.raises(ModelError, match="no residual branches for SBP-SR") as refused:
            begin()
        assert "another criterion" in refused.value.hint


def test_sbp_sr_is_trained_with_scaled_branches_where_training_goes_on_and_as_its_control(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, scaled = training.fit, []

    def watched(model: nn.Module, *given: Any, **named: Any) -> Generator[Any, None, Any]:
        ends, ones = residual.branch_ends(model), torch.ones(1, 16, 4, 4)
        found = ends[0].eval()(ones) / nn.BatchNorm2d(16).eval()(ones)
        scaled.append(torch.allclose(found, ones * len(ends) ** -0.5))
        return (yield from fit(model, *given, **named))

    monkeypatch.setattr(training, "fit", watched)
    asked = PruneConfig(criterion="sbp-sr", material="images", per_class=2)
    path, kept, _ = pipeline.prune(space, asked, 0, CPU)
    folder = pipeline.run_folder(space, path.stem, "", 0)
    config = TrainConfig(epochs=2, amp="off")
    begun = pipeline.finetune(space, config, (path.stem, kept), folder, 0, CPU)
    next(begun)
    begun.close()
    deque(pipeline.finetune(space, config, (path.stem, kept), folder, 0, CPU), maxlen=0)
    control = PruneConfig(criterion="same-densities", like=path.stem)
    like, random, _ = pipeline.prune(space, control, 0, CPU)
    folder = pipeline.run_folder(space, like.stem, "", 0)
    next(pipeline.finetune(space, config, (like.stem, random), folder, 0, CPU))
    assert scaled == [True, True, True]


def test_a_mask_to_be_like_must_be_there_and_of_this_network(space: Workspace) -> None:
    path, kept, _ = pipeline.prune(space, PruneConfig(criterion="random", sparsity=0.8), 0, CPU)
    config = PruneConfig(criterion="same-densities", like=path.stem)
    drawn, same, _ = pipeline.prune(space, config, 1, CPU)
    assert drawn.stem == f"same-densities-{path.stem}-s1"
    assert [row.kept for row in same.layers()] == [row.kept for row in kept.layers()]
    assert same.about["sparsity"] == 0.8  # as asked for, though some 0.8000004 are gone
    with pytest.raises(StoreError, match="no mask random") as refused:
        pipeline.prune(space, replace(config, like="random-0.8-s1"), 0, CPU)
    assert refused.value.hint == "did you mean 'random-0.8-s0'?"
    deeper = replace(space, model=ModelConfig("resnet32"))
    with pytest.raises(ModelError, match="not one of this model"):
        pipeline.prune(deeper, config, 0, CPU)


def test_another_number_of_rounds_under_the_same_name_is_refused(space: Workspace) -> None:
    pipeline.prune(space, ITERATED, 0, CPU, name="mine")
    other = PruneConfig.from_dict({**ITERATED.to_dict(), "rounds": 3}, "prune")
    with pytest.raises(StoreError, match="other settings"):
        pipeline.prune(space, other, 0, CPU, name="mine")


def test_the_command_tells_both_sparsities_the_rounds_and_the_rule(space: Workspace) -> None:
    command = ["prune", "-w", str(space.root), "--criterion", "synflow", "--rounds", "3",
               "--variant", "published", "--definition", "all", "--device", "cpu"]  # fmt: skip
    done = CliRunner().invoke(dopfast, command, auto_envvar_prefix="DOPFAST")
    assert done.exit_code == 0, done.output
    assert "criterion synflow as published, material none, rounds 3" in done.output
    assert "% of prunable weights, " in done.output and "% of all parameters" in done.output
    shown = CliRunner().invoke(dopfast, [*command, "--json"], auto_envvar_prefix="DOPFAST")
    result = json.loads(shown.stdout)
    assert result["rounds"] == 3
    assert result["sparsity_overall"] == pytest.approx(0.9, abs=1e-5)
    assert result["sparsity_prunable"] > result["sparsity_overall"]


def test_under_a_pattern_the_scores_choose_two_of_every_four(space: Workspace) -> None:
    config = PruneConfig(criterion="snip", material="images", per_class=2, pattern="2:4")
    path, kept, model = pipeline.prune(space, config, 0, CPU)
    assert path.stem == "snip-images-2of4-s0"
    assert kept.about["sparsity"] == pytest.approx(kept.sparsity)
    assert kept.masks["conv1.weight"].all()  # of three colours
    for name, mask in kept.masks.items():
        if name != "conv1.weight":
            fours = mask.movedim(1, -1).unflatten(-1, (-1, 4))
            assert bool((fours.sum(-1) == 2).all())
    assert pipeline.prune(space, config, 0, CPU)[1].about == kept.about  # the same is found again
    assert masks.load(path).total == sum(w.numel() for w in models.prunable(model).values())


@pytest.mark.parametrize(
    ("settings", "option"),
    [({"rounds": 3}, "--rounds"), ({"definition": "all"}, "--definition"),
     ({"min_layer_density": 0.1}, "--min-layer-density")],
)  # fmt: skip
def test_a_pattern_goes_with_no_other_share(
    space: Workspace, settings: dict[str, Any], option: str
) -> None:
    with pytest.raises(ConfigError, match="2:4 alone") as refused:
        pipeline.prune(space, PruneConfig(criterion="snip", pattern="2:4", **settings), 0, CPU)
    assert option in refused.value.hint


def test_a_mask_of_before_a_setting_was_there_is_the_same(space: Workspace) -> None:
    config = PruneConfig(criterion="magnitude")
    path, kept, _ = pipeline.prune(space, config, 0, CPU)
    del kept.about["settings"]["pattern"]
    masks.save(path, kept)
    assert pipeline.prune(space, config, 0, CPU)[1].kept == kept.kept
