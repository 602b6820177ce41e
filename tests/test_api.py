"""The Python API: light to import, as the command line in a workspace, and on any network."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from small_networks import chunks, plain
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dop_fast
from dop_fast import api, criteria, masks, models, options
from dop_fast.config import ExtractConfig, PruneConfig, StitchConfig, TrainConfig
from dop_fast.errors import ConfigError, DataError, ModelError


def test_importing_the_package_loads_no_torch_and_names_its_api() -> None:
    code = (
        "import sys, dop_fast\n"
        "assert 'prune' in dir(dop_fast)\n"
        "assert not hasattr(dop_fast, 'prone')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_every_public_name_is_one_of_the_api() -> None:
    assert dop_fast.__all__ == api.__all__
    for name in dop_fast.__all__:
        assert getattr(dop_fast, name) is getattr(api, name)
        assert getattr(dop_fast, name).__doc__


@pytest.mark.parametrize(
    ("kind", "config", "more"),
    [
        (options.Extraction, ExtractConfig, {}),
        (options.Stitching, StitchConfig, {}),
        (options.Pruning, PruneConfig, {}),
        (options.Training, TrainConfig, {"recipe": str}),
    ],
)
def test_keyword_arguments_have_the_names_and_types_of_the_settings(
    kind: type, config: type, more: dict[str, type]
) -> None:
    hints = get_type_hints(config)
    own = {item.name: hints[item.name] for item in fields(config)}
    assert get_type_hints(kind) == {**own, **more}


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
def test_a_network_of_ones_own_is_pruned_by_its_own_batches(criterion: str) -> None:
    model = plain()
    before = models.fingerprint(model)
    ((images, labels),) = chunks(12)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    kept = dop_fast.prune(model, loader, criterion=criterion, sparsity=0.75)
    scores = criteria.load(criterion).score(model, chunks(4, 4, 4), cross_entropy, 0)
    expected = masks.keep_top(scores, 0.75)
    assert all(torch.equal(kept.masks[name], mask) for name, mask in expected.masks.items())
    assert models.fingerprint(model) == before
    assert kept.about["criterion"] == criterion


def test_batches_that_come_only_once_are_enough() -> None:
    kept = dop_fast.prune(plain(), iter(chunks(4, 4)), criterion="grasp")
    again = dop_fast.prune(plain(), chunks(4, 4), criterion="grasp")
    assert all(torch.equal(kept.masks[name], mask) for name, mask in again.masks.items())


def test_rounds_patterns_and_the_other_settings_are_those_of_the_command() -> None:
    model, batches = plain(), chunks(6)
    kept = dop_fast.prune(model, batches, criterion="iter-snip", rounds=3, sparsity=0.5)
    assert kept.kept == round(kept.total * 0.5)
    fours = dop_fast.prune(model, batches, criterion="snip", pattern="2:4")
    assert [row.density for row in fours.layers()] == [1, 0.5, 1]
    everything = sum(value.numel() for value in model.parameters())
    of_all = dop_fast.prune(model, batches, criterion="snip", sparsity=0.5, definition="all")
    assert of_all.total - of_all.kept == round(everything * 0.5)
    with pytest.raises(ConfigError, match="sparcity"):
        dop_fast.prune(model, batches, sparcity=0.5)
    with pytest.raises(ConfigError, match="material is a setting of workspaces"):
        dop_fast.prune(model, batches, material="images")


def test_criteria_without_data_need_the_size_of_an_input() -> None:
    kept = dop_fast.prune(plain(), criterion="synflow", image=(3, 6, 6), sparsity=0.5)
    assert kept.kept == round(kept.total * 0.5)
    with pytest.raises(DataError, match="size of an input"):
        dop_fast.prune(plain(), criterion="synflow")
    with pytest.raises(DataError, match="no samples"):
        dop_fast.prune(plain(), criterion="snip")


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_held_mask_stays_in_a_loop_of_ones_own_until_it_is_let_go(kind: str) -> None:
    model, batches = plain(), chunks(6)
    kept = dop_fast.prune(model, batches, criterion="snip", sparsity=0.5)
    settings = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(
        model.parameters(), lr=0.01, weight_decay=0.01, **settings
    )
    handle = dop_fast.hold(model, kept, optimizer)
    weights = dict(model.named_parameters())

    def removed() -> int:
        return sum(int(weights[name][~mask].count_nonzero()) for name, mask in kept.masks.items())

    before = models.fingerprint(model)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        assert removed() == 0
    assert models.fingerprint(model) != before
    handle.remove()
    cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert removed() > 0


def test_a_mask_applies_to_a_module_in_one_line(tmp_path: Path) -> None:
    kept = dop_fast.prune(plain(), chunks(6), criterion="snip", sparsity=0.5)
    dop_fast.save_mask(tmp_path / "mask.safetensors", kept)
    model = plain()
    dop_fast.apply_mask(model, dop_fast.load_mask(tmp_path / "mask.safetensors"))
    zeros = sum(int((weight == 0).sum()) for weight in models.prunable(model).values())
    assert zeros == kept.total - kept.kept


def test_a_workspace_goes_by_its_folder_with_settings_over_its_toml(
    tmp_path: Path, tiny_images: Path
) -> None:
    space = dop_fast.init(tmp_path, str(tiny_images), size=16, teacher="resnet20", seed=3)
    toml = tmp_path / "dopfast.toml"
    toml.write_text(
        toml.read_text(encoding="utf-8")
        .replace("# sparsity = 0.9", "sparsity = 0.8", 1)
        .replace('# criterion = "grasp"', 'criterion = "random"', 1),
        encoding="utf-8",
    )
    kept = dop_fast.prune(tmp_path, device="cpu")
    assert (kept.kept, kept.about["seed"]) == (round(kept.total * 0.2), 3)
    assert (space.masks / "random-0.8-s3.safetensors").is_file()
    assert dop_fast.prune(tmp_path, sparsity=0.7, seed=4, device="cpu").about["seed"] == 4
    epochs: list[float] = []
    told = dop_fast.finetune(
        tmp_path, "random-0.8-s3", epochs=1, batch_size=12, device="cpu",
        each=lambda epoch: epochs.append(epoch.top1),
    )  # fmt: skip
    assert epochs == [told["top1"]]
    assert (space.runs / "random-0.8-s3" / "weights.safetensors").is_file()
    dense = dop_fast.finetune(tmp_path, None, epochs=1, batch_size=12, device="cpu")
    assert set(dense) == set(told)
    assert (space.runs / "dense-s3").is_dir()


def test_a_network_that_has_nothing_to_prune_is_told() -> None:
    with pytest.raises(ModelError, match="no prunable weights"):
        dop_fast.prune(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), chunks(4), criterion="snip")
