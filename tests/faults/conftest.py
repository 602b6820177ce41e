"""A finished workspace of a small network, and the command line in this process."""

import shutil
from pathlib import Path

import pytest
from small_space import STAGES, Run, Told, begin

from dop_fast.cli.main import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a caller of `dopfast` in this process; what is no known failure is raised."""

    def called(*arguments: str | Path) -> Told:
        monkeypatch.setattr("sys.argv", ["dopfast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Told(code, *capsys.readouterr())

    return called


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
