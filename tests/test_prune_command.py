"""What `dopfast prune` tells of the mask it made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from dop_fast import masks, models, pipeline, reach
from dop_fast.cli.main import dopfast
from dop_fast.masks import MaskSet

SIZE = (3, 32, 32)


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Path:
    pipeline.init(
        tmp_path, data=str(tiny_images), size=32, teacher="resnet20", model="", seed=0, force=False
    )
    return tmp_path


def prune(space: Path, *arguments: str) -> Result:
    done = CliRunner().invoke(
        dopfast, ["prune", "-w", str(space), "--criterion", "random", "--device", "cpu", *arguments]
    )
    assert done.exit_code == 0, done.output
    return done


def as_json(space: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(prune(space, "--json", *arguments).stdout)
    return found


def test_effective_counts_stand_in_the_table_the_totals_and_the_json(space: Path) -> None:
    told = as_json(space, "--sparsity", "0.98")
    model = models.build("resnet20", 3, 0)
    kept = masks.load(space / "masks" / "random-0.98-s0.safetensors")
    alive = reach.follow(model, kept, SIZE).alive
    assert told["alive"] == alive.kept < told["kept"] == kept.kept
    assert told["effective_sparsity_overall"] == alive.overall_sparsity(model)
    assert [row["alive"] for row in told["layers"].values()] == [r.kept for r in alive.layers()]
    shown = prune(space, "--sparsity", "0.98")
    assert f"effective sparsity {alive.sparsity:.4%}" in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith("layer2.0.conv1")]
    (row,) = (row for row in alive.layers() if row.name == "layer2.0.conv1.weight")
    assert rows[0][-1] == str(row.kept)


@pytest.mark.parametrize(
    ("option", "word", "near"),
    [("--criterion", "grapes", "grasp"), ("--material", "imges", "images")],
)
def test_an_unknown_word_is_refused_with_the_nearest(
    space: Path, option: str, word: str, near: str
) -> None:
    done = CliRunner().invoke(dopfast, ["prune", "-w", str(space), option, word])
    assert done.exit_code == 2
    assert f"there is no {word!r}; did you mean {near!r}?" in done.stderr


def test_a_collapse_warns_with_the_names_of_the_layers_that_cut(space: Path) -> None:
    told = as_json(space, "--sparsity", "0.9999")
    assert told["collapsed"] and told["alive"] == 0 and told["outputs_reached"] == 0
    assert told["cut"]
    (warning,) = told["warnings"]
    assert "layer collapse" in warning and told["cut"][0] in warning
    assert "--min-layer-density" in warning
    assert "layer collapse" in prune(space, "--sparsity", "0.9999").stderr


def test_a_dead_branch_and_lost_outputs_warn_without_the_word_collapse(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_top(scores: Any, *rest: Any, **more: Any) -> MaskSet:
        kept = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
        kept["layer1.0.conv1.weight"].zero_()
        kept["linear.weight"][1:] = False
        return MaskSet(kept)

    monkeypatch.setattr(masks, "keep_top", keep_top)
    first, second = as_json(space)["warnings"]
    assert "no path leads through layer1.0.conv1.weight, layer1.0.conv2.weight" in first
    assert "no path leads to 2 of the 3 outputs" in second


def test_a_network_without_fixed_paths_is_pruned_and_told_as_such(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (space / "choosy.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, n):\n"
        "        super().__init__()\n"
        "        self.head = torch.nn.Linear(3 * 32 * 32, n)\n"
        "    def forward(self, x):\n"
        "        y = self.head(x.flatten(1))\n"
        "        return y if y.sum().item() > 0 else -y\n"
        "def net(num_classes):\n"
        "    return Net(num_classes)\n",
        encoding="utf-8",
    )
    toml = space / "dopfast.toml"
    text = toml.read_text(encoding="utf-8")
    head, _, model = text.partition("[model]")
    toml.write_text(head + "[model]" + model.replace("resnet20", "choosy:net", 1), encoding="utf-8")
    told = as_json(space)
    assert "alive" not in told and told["kept"] == round(told["total"] * 0.1)
    assert "effective sparsity is unknown" in told["warnings"][0]
