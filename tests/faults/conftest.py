"""A finished workspace of a small network."""

import shutil
from pathlib import Path

import pytest
from small_space import STAGES, begin

from dop_fast.cli.main import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """Return a workspace where every stage ran once."""
    root = tmp_path_factory.mktemp("finished") / "space"
    begin(root, tiny_images)
    with pytest.MonkeyPatch.context() as patch:
        for command in STAGES:
            patch.setattr("sys.argv", ["dopfast", command, "-w", str(root), "-q"])
            main()
    return root


@pytest.fixture
def space(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished workspace that a test may change."""
    return shutil.copytree(finished, tmp_path / "space", symlinks=True)
