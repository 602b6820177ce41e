"""A disk that is full: what was complete stays, and the same command goes on when there is room."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_space import Run, contents

COMMANDS = {  # and the kilobytes that are left for it: not enough
    "extract --force --min-area 0": 16,
    "stitch --force --per-class 40": 16,
    "prune --criterion random --name new": 4,
    "import masks/snip-stitched-0.9-s0.safetensors --name new": 4,
    "export dense": 0,
    "export onnx": 4,
    "report": 16,
    "show concepts": 8,
    "sanity --criterion snip --material images --start 6 --budget 12 --finetune": 12,
    "sweep few.toml": 12,
    "finetune --name new": 12,
}


@pytest.fixture
def cramped(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the finished workspace on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    space = folder / "space"
    shutil.copytree(finished, space)
    yield space
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_loses_nothing_that_was_complete(
    cramped: Path, run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cramped)
    Path("few.toml").write_text(
        'criteria = ["random"]\nsparsities = [0.5]\nseeds = 1\nfinetune = { epochs = 1 }\n'
    )
    free = shutil.disk_usage(cramped).free
    (cramped.parent / "filler").write_bytes(bytes(free - (COMMANDS[command] << 10)))
    before = contents(cramped)
    told = run(*command.split(), "-w", cramped)
    assert told.code == 1, told
    assert "the disk is full" in told.err and "hint: make room" in told.err
    after = contents(cramped)
    assert {path: after.get(path) for path in before} == before
    (cramped.parent / "filler").unlink()
    assert run(*command.split(), "-w", cramped).code == 0
    assert not list(cramped.rglob("*.partial"))
