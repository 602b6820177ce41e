"""The demo's folder: begun, interrupted, made anew, and never somebody else's."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_space import begin, contents

from dop_fast import demo, showcase
from dop_fast.errors import StoreError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_images_and_no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(*_: Any) -> Iterator[str]:
        yield "stages"

    monkeypatch.setattr(showcase, "_stages", stages)
    monkeypatch.setattr(demo, "write_images", partial(demo.write_images, train=2, val=1))


def run(folder: Path, *, force: bool = False) -> None:
    assert list(showcase.run(folder, 0, CPU, force=force)) == ["stages"]


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(call, interrupt)
        run(folder, force=folder.exists())


@pytest.mark.parametrize("call", ["dop_fast.workspace.create", "PIL.Image.Image.save"])
def test_a_demo_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    interrupted(tmp_path / "demo", monkeypatch, call)
    run(tmp_path / "demo")
    assert demo.has_truth(tmp_path / "demo/data") and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("call", ["shutil.rmtree", "PIL.Image.Image.save"])
def test_a_demo_whose_replacement_was_interrupted_has_all_images_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = tmp_path / "demo"
    run(folder)
    drawn = contents(folder / "data")
    (folder / "notes").touch()
    interrupted(folder, monkeypatch, call)
    assert not (folder / "data").exists() or contents(folder / "data") == drawn
    run(folder, force=True)
    assert contents(folder / "data") == drawn
    assert sorted(path.name for path in folder.iterdir()) == ["claims", "data", "dopfast.toml"]


@pytest.mark.parametrize("force", [False, True])
def test_the_demo_leaves_other_workspaces_and_folders_alone(
    tmp_path: Path, tiny_images: Path, force: bool
) -> None:
    """Their images lie where the demo's would, elsewhere, or there is no workspace at all."""
    begin(tmp_path / "own", tiny_images)
    begin(tmp_path / "far", tiny_images)
    (tmp_path / "far/data").rename(tmp_path / "data")
    (tmp_path / "far/dopfast.toml").write_text('[data]\npath = "../data"\n')
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("years of work")
    for name in ("own", "far", "thesis"):
        before = contents(tmp_path / name)
        with pytest.raises(StoreError, match="holds other files"):
            run(tmp_path / name, force=force)
        assert contents(tmp_path / name) == before
