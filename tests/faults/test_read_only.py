"""A workspace that nothing can be written to: every command says so, and reading goes on."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_space import Run, contents

MASK = "snip-stitched-0.9-s0"
COMMANDS = (
    "train", "train --force", "extract --force", "stitch --force", "prune --criterion random",
    f"prune --force --name {MASK}", "finetune", "sanity --criterion snip", "report",
    "show concepts", "export masks", "export onnx", f"import masks/{MASK}.safetensors --force",
    "sweep few.toml", "init --data data --force",
)  # fmt: skip


@pytest.fixture(scope="module")
def locked(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a copy of the finished workspace on a disk of its own that is read-only."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    space = shutil.copytree(finished, folder / "space")
    (space / "few.toml").write_text('criteria = ["random"]\nsparsities = [0.5]\nseeds = 1\n')
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield space
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_written_is_told(
    locked: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(locked)
    before = contents(locked)
    told = run(*command.split(), "-w", locked)
    assert told.code == 1, told
    assert f"Read-only file system: {locked}" in told.err and "\nhint: " in told.err
    assert ".partial" not in told.err and contents(locked) == before


def test_what_is_there_can_be_read(locked: Path, run: Run, tmp_path: Path) -> None:
    for command in ("verify", "finetune --dry-run", f"show stitched -o {tmp_path}/a.png",
                    f"export dense -o {tmp_path}/a.safetensors"):  # fmt: skip
        assert run(*command.split(), "-w", locked).code == 0, command
