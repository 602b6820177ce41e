import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dop_fast import recipes, sweep, training, workspace
from dop_fast.cli.main import dopfast
from dop_fast.config import TrainConfig
from dop_fast.errors import ConfigError
from dop_fast.workspace import Workspace


@pytest.mark.parametrize(
    ("name", "epochs", "falls"),
    [("paper", 120, [30, 60, 90]), ("grasp", 150, [50, 100]), ("cifar", 160, [80, 120])],
)
def test_a_recipe_is_the_published_one(name: str, epochs: int, falls: list[int]) -> None:
    config = TrainConfig.from_dict({"recipe": name}, "finetune")
    assert (config.epochs, config.lr, config.batch_size) == (epochs, 0.1, 128)
    assert (config.momentum, config.weight_decay, config.warmup) == (0.9, 1e-4, 0)
    rates = [training.learning_rate(config, step, epochs * 7) for step in range(epochs * 7)]
    assert [step / 7 for step in range(1, epochs * 7) if rates[step] != rates[step - 1]] == falls
    assert rates[-1] == pytest.approx(0.1 * 0.1 ** len(falls))


def test_every_recipe_names_its_source() -> None:
    assert recipes.names() == ("cifar", "grasp", "paper")
    for name in recipes.names():
        assert "et al." in (recipes.FOLDER / f"{name}.toml").read_text().splitlines()[0]


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe called 'cifra'") as caught:
        TrainConfig.from_dict({"recipe": "cifra"}, "finetune")
    assert "cifar" in caught.value.hint


def values(root: Path, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
    command = ["finetune", "-w", str(root), "--dry-run", "--json", *arguments]
    result = CliRunner(env=environment).invoke(dopfast, command, auto_envvar_prefix="DOPFAST")
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, Any]] = json.loads(result.output)["values"]
    return found


def test_flag_beats_environment_beats_file_beats_recipe_beats_default(tmp_path: Path) -> None:
    (tmp_path / "dopfast.toml").write_text("[finetune]\nlr = 0.3\n", encoding="utf-8")
    shown = values(
        tmp_path, "--recipe", "cifar", "--momentum", "0.8", DOPFAST_FINETUNE_BATCH_SIZE="64"
    )
    assert shown["momentum"] == {"value": 0.8, "source": "flag"}
    assert shown["batch_size"] == {"value": 64, "source": "environment"}
    assert shown["lr"] == {"value": 0.3, "source": "dopfast.toml"}
    assert shown["epochs"] == {"value": 160, "source": "recipe cifar"}
    assert shown["milestones"] == {"value": [0.5, 0.75], "source": "recipe cifar"}
    assert shown["warmup"] == {"value": 0.0, "source": "default"}
    assert shown["recipe"] == {"value": "cifar", "source": "flag"}


def test_a_recipe_may_come_from_the_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "dopfast.toml").write_text('[finetune]\nrecipe = "grasp"\n', encoding="utf-8")
    assert values(tmp_path)["epochs"] == {"value": 150, "source": "recipe grasp"}
    shown = values(tmp_path, DOPFAST_FINETUNE_RECIPE="cifar")
    assert shown["epochs"] == {"value": 160, "source": "recipe cifar"}


def test_a_workspace_and_a_sweep_may_name_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "dopfast.toml").write_text('[train]\nrecipe = "x"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no recipe called 'x'"):
        workspace.load(tmp_path)
    made = Workspace(
        tmp_path, 0, *(workspace.DataConfig(), workspace.TeacherConfig(), workspace.ModelConfig()),
        {"finetune": {"recipe": "cifar", "lr": 0.2}},
    )  # fmt: skip
    workspace.create(made, force=True)
    assert workspace.load(tmp_path).stages["finetune"] == {"recipe": "cifar", "lr": 0.2}
    asked = sweep.load(sweep.find("cifar10-table1.toml")).finetune
    assert asked == TrainConfig(epochs=160, milestones=(0.5, 0.75))
