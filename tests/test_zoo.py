"""Networks of timm and of Hugging Face, by name; nothing is downloaded."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dop_fast import models
from dop_fast.config import TeacherConfig
from dop_fast.errors import ModelError

TINY = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a trained Hugging Face classifier of 3 classes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("resnet", **TINY)
    torch.manual_seed(7)
    model = transformers.AutoModelForImageClassification.from_config(config)
    model.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name)

    monkeypatch.setattr("dop_fast.models.libraries.importlib.import_module", load)


def test_a_name_that_only_timm_has_needs_no_prefix() -> None:
    pytest.importorskip("timm")
    short, full = (models.build(name, 4, 3) for name in ("test_vit", "timm:test_vit"))
    assert models.fingerprint(short) == models.fingerprint(full)
    assert short(torch.zeros(1, 3, 160, 160)).shape == (1, 4)
    assert models.fingerprint(models.build("test_vit", 4, 5)) != models.fingerprint(short)


def test_a_name_that_both_have_is_torchvisions_without_the_prefix() -> None:
    pytest.importorskip("timm")
    bare, prefixed = (models.build(name, 4, 0) for name in ("resnet18", "timm:resnet18"))
    assert type(bare).__module__.startswith("torchvision.")
    assert type(prefixed).__module__.startswith("timm.")


@pytest.mark.parametrize(
    ("name", "near"),
    [("timm:convnext_tinny", "convnext_tiny"), ("mixer_s32_225", "timm:mixer_s32_224")],
)
def test_an_unknown_name_is_told_timms_neighbours(name: str, near: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ModelError) as caught:
        models.parse_teacher(name)
    assert near in caught.value.hint


@pytest.mark.parametrize(("package", "name"), [("timm", "timm:resnet18"), ("transformers", "hf:x")])
def test_a_missing_library_is_named_with_its_extra(
    package: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(package, monkeypatch)
    with pytest.raises(ModelError, match=f"{package} is not installed") as caught:
        models.build(name, 3, 0)
    assert f"dopfast[{package}]" in caught.value.hint


@pytest.mark.parametrize("where", ["root", "cwd"])
def test_a_folders_configuration_gives_a_fresh_network_with_its_own_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(folder.parent if where == "cwd" else elsewhere)
    root = folder.parent if where == "root" else elsewhere
    model = models.build("hf:classifier", 5, 1, root)
    assert models.fingerprint(model) == models.fingerprint(
        models.build("hf:classifier", 5, 1, root)
    )
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert "resnet.embedder.embedder.convolution.weight" in models.prunable(model)


def test_a_type_of_model_has_the_configuration_of_its_library() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):  # drawn on the CPU in any case
        model = models.build("hf:mobilenet_v1", 3, 0)
    assert next(model.parameters()).device.type == "cpu"
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_a_folders_weights_are_a_teacher(folder: Path) -> None:
    assert models.parse_teacher("hf:classifier=DEFAULT") == TeacherConfig(
        "hf:classifier", "DEFAULT"
    )
    teacher = models.load_teacher(TeacherConfig("hf:classifier", "DEFAULT"), 3, folder.parent)
    saved = models.read_tensors(folder / "model.safetensors")
    assert models.fingerprint(teacher) == models.fingerprint(saved)
    assert not teacher.training
    with pytest.raises(ModelError, match="trained on 3 classes, the data has 4"):
        models.load_teacher(TeacherConfig("hf:classifier", "DEFAULT"), 4, folder.parent)


def test_timms_weights_must_know_as_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    fresh = timm.create_model("test_vit")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: fresh)
    assert models.load_teacher(TeacherConfig("timm:test_vit", "DEFAULT"), 1000, Path()) is fresh
    with pytest.raises(ModelError, match="1000 classes, the data has 10"):
        models.load_teacher(TeacherConfig("test_vit", "DEFAULT"), 10, Path())


def test_what_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, transformers = map(pytest.importorskip, ("timm", "transformers"))

    def offline(*names: object, **options: object) -> nn.Module:
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    for auto in (transformers.AutoConfig, transformers.AutoModelForImageClassification):
        monkeypatch.setattr(auto, "from_pretrained", offline)
    for name in ("timm:test_vit", "hf:someone/classifier"):
        with pytest.raises(ModelError, match="no route"):
            models.load_teacher(TeacherConfig(name, "DEFAULT"), 1000, Path())
    with pytest.raises(ModelError, match="no route"):
        models.build("hf:someone/classifier", 3, 0)


def test_a_folder_that_is_not_there_is_told_the_types() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ModelError, match="no folder resnett") as caught:
        models.build("hf:resnett", 3, 0)
    assert "resnet" in caught.value.hint


def test_code_beside_a_configuration_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', encoding="utf-8"
    )
    (tmp_path / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.raises(ModelError, match="configuration of hf:"):
        models.build(f"hf:{tmp_path}", 3, 0)
