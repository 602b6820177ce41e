"""`dopfast export` and `dopfast import`: what a workspace gives to other programs and takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from dop_fast import masks, models, pipeline
from dop_fast.cli.main import dopfast
from dop_fast.config import PruneConfig, TrainConfig
from dop_fast.errors import ConfigError, StoreError
from dop_fast.masks import MaskSet
from dop_fast.workspace import Workspace

CPU = torch.device("cpu")
MASK = "random-0.9-s0"


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Workspace:
    made, _, _ = pipeline.init(
        tmp_path / "space", data=str(tiny_images), size=16, teacher="resnet20", model="", seed=0,
        force=False,
    )  # fmt: skip
    pipeline.prune(made, PruneConfig(criterion="random"), 0, CPU)
    return made


def train(space: Workspace, mask: str) -> Path:
    chosen = pipeline.open_mask(space, mask) if mask else None
    folder = pipeline.run_folder(space, mask, "", 0)
    config = TrainConfig(epochs=1, batch_size=12)
    for _ in pipeline.finetune(space, config, chosen, folder, 0, CPU):
        pass
    return folder


def invoke(space: Workspace, *arguments: str) -> Result:
    command = [*arguments, "-w", str(space.root)]
    return CliRunner().invoke(dopfast, command, auto_envvar_prefix="DOPFAST")


def told(space: Workspace, *arguments: str) -> dict[str, Any]:
    done = invoke(space, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_mask_is_written_with_its_weights_before_training(space: Workspace) -> None:
    found = told(space, "export", "dense")
    path = space.root / "exports" / f"{MASK}-dense.safetensors"
    assert found["wrote"] == [str(path)] and found["bytes"] == path.stat().st_size
    model = models.build("resnet20", 3, 0)
    kept = masks.load(space.masks / f"{MASK}.safetensors")
    masks.apply_(model, kept)
    assert models.fingerprint(load_file(path)) == models.fingerprint(model)
    assert found["parameters"] - found["kept"] == kept.total - kept.kept
    assert found["sparse_flops"] < found["flops"]


def test_the_text_says_what_zeros_do_not_do(space: Workspace) -> None:
    shown = invoke(space, "export", "csr", "--mask", MASK).stdout
    assert "parameters" in shown and "FLOPs" in shown and " MB" in shown
    assert "do not make a dense runtime faster" in shown


def test_the_last_run_is_written_as_it_was_trained(space: Workspace) -> None:
    folder = train(space, MASK)
    found = told(space, "export", "dense")
    assert found["name"] == MASK
    trained = load_file(folder / "weights.safetensors")
    assert models.fingerprint(load_file(found["path"])) == models.fingerprint(trained)
    before = told(space, "export", "dense", "--mask", MASK, "-o", str(space.root / "x.safetensors"))
    assert models.fingerprint(load_file(before["path"])) != models.fingerprint(trained)


def test_a_dense_run_keeps_everything(space: Workspace) -> None:
    train(space, "")
    found = told(space, "export", "csr", "--run", "dense-s0")
    assert found["kept"] == found["parameters"] and found["sparse_flops"] == found["flops"]


def test_a_run_whose_mask_has_changed_is_refused(space: Workspace) -> None:
    train(space, MASK)
    path = space.masks / f"{MASK}.safetensors"
    masks.save(path, masks.shuffled(masks.load(path), 1))
    done = invoke(space, "export", "dense")
    assert done.exit_code == 1 and isinstance(done.exception, StoreError)
    assert "not the one" in done.exception.message


@pytest.mark.parametrize("command", [("export", "masks"), ("import", "x.safetensors")])
def test_another_file_that_is_there_is_kept_unless_forced(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    monkeypatch.chdir(space.root)
    shutil.copy(space.masks / f"{MASK}.safetensors", "x.safetensors")
    path = Path(told(space, *command)["wrote"][0])
    made = path.read_bytes()
    told(space, *command)  # once more: the same is there
    masks.save(path, masks.shuffled(masks.load(path), 1))
    other = path.read_bytes()
    done = invoke(space, *command)
    assert isinstance(done.exception, StoreError) and "--force" in done.exception.hint
    assert path.read_bytes() == other and not list(path.parent.glob("*.partial"))
    told(space, *command, "--force")
    assert path.read_bytes() == made


def test_show_replaces_no_file_that_it_did_not_make(space: Workspace) -> None:
    photo = space.root / "photo.png"
    command = ("show", "segments", "-o", str(photo))
    told(space, *command)
    told(space, *command)  # once more: the same is there
    photo.write_bytes(b"the only one of her")
    done = invoke(space, *command)
    assert isinstance(done.exception, StoreError) and "--force" in done.exception.hint
    assert photo.read_bytes() == b"the only one of her"
    told(space, *command, "--force")


@pytest.mark.parametrize("kind", ["dense", "prune", "csr", "masks"])
def test_an_exported_mask_is_imported_as_it_was(space: Workspace, kind: str) -> None:
    file = told(space, "export", kind)["path"]
    found = told(space, "import", file, "--name", "again")
    kept, again = (masks.load(space.masks / f"{name}.safetensors") for name in (MASK, "again"))
    assert models.fingerprint(kept.masks) == models.fingerprint(again.masks)
    assert again.about == kept.about and found["kept"] == kept.kept


def test_a_mask_of_another_program_is_trained_from_the_seeds_weights(space: Workspace) -> None:
    kept = masks.load(space.masks / f"{MASK}.safetensors")
    torch.save({name: mask.float() for name, mask in kept.masks.items()}, space.root / "mask.pth")
    found = told(space, "import", str(space.root / "mask.pth"), "--seed", "5")
    assert found["criterion"] == "imported" and found["seed"] == 5
    weights = load_file(train(space, "mask") / "weights.safetensors")
    for name, mask in kept.masks.items():
        assert not bool(weights[name][~mask].any())
    assert told(space, "export", "masks")["kept"] < sum(w.numel() for w in weights.values())
    done = invoke(space, "import", str(space.root / "mask.pth"))
    assert isinstance(done.exception, StoreError) and "--name" in done.exception.hint


def test_a_mask_of_another_network_is_refused(space: Workspace) -> None:
    other = models.prunable(models.build("resnet32", 3, 0))
    ones = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in other.items()}
    masks.save(space.root / "other.safetensors", MaskSet(ones))
    done = invoke(space, "import", str(space.root / "other.safetensors"))
    assert done.exit_code == 1 and "not one of this model" in str(done.exception)
    assert not (space.masks / "other.safetensors").exists()


def test_no_name_leads_out_of_the_workspace(space: Workspace) -> None:
    file = told(space, "export", "masks")["path"]
    for command in (("import", file, "--name", "../out"), ("export", "masks", "--run", "../out")):
        done = invoke(space, *command)
        assert isinstance(done.exception, ConfigError) and "is no name" in done.exception.message
    assert not (space.root / "out.safetensors").exists()
