import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dop_fast import disk, models
from dop_fast.errors import StoreError


def test_what_is_written_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, happened = tmp_path / "a", []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        happened.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def renamed(partial: Path, target: Path) -> Path:
        happened.append("rename")
        return replace(partial, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    disk.write(path, b"new")
    assert happened == ["a", "rename", "rename", tmp_path.name]
    assert path.read_bytes() == b"new"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", disk.FULL)
def test_a_full_disk_says_how_much_is_needed_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def half(partial: Path, content: bytes) -> int:
        with partial.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StoreError, match=r"disk is full: .*a needs 3,000 kB") as caught:
        disk.write(path, bytes(3_000_000))
    assert "make room" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_weights_that_do_not_fit_on_the_disk_keep_the_old_ones(small_disk: Path) -> None:
    path = small_disk / "weights.safetensors"
    models.save_weights(path, torch.nn.Linear(3, 3), {"model": "x"})
    old = path.read_bytes()
    with pytest.raises(StoreError, match=r"disk is full: .* needs 4,004 kB"):
        models.save_weights(path, torch.nn.Linear(1000, 1000), {"model": "y"})
    assert path.read_bytes() == old
    assert [found.name for found in small_disk.iterdir()] == [path.name]


def test_another_failure_is_told_of_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError) as caught:
        disk.write(tmp_path / "a", b"")
    assert (caught.value.errno, caught.value.filename) == (errno.EISDIR, str(tmp_path / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(StoreError, match=f"{name} is no plain file"):
            disk.write(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 2


def elsewhere(code: str) -> None:
    """Run code in another process, to its end."""
    lead = "import os, signal, sys; from pathlib import Path; from dop_fast import disk; "
    subprocess.run([sys.executable, "-c", lead + code])


def test_a_file_is_whole_whoever_else_writes_it_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with disk.replacing(path, 4) as partial:
        partial.write_bytes(b"our")
        elsewhere(f"disk.write(Path({str(path)!r}), b'theirs')")
        assert path.read_bytes() == b"theirs"
        partial.write_bytes(b"ours")
    assert path.read_bytes() == b"ours"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    for name in ("a", "b"):
        elsewhere(f"""
with disk.replacing(Path({str(tmp_path / name)!r}), 4) as partial:
    partial.write_bytes(b"ha")
    (partial.parent / ".tmpX").touch()  # as safetensors does
    os.kill(os.getpid(), signal.SIGKILL)
""")
    assert [path.name[0] for path in sorted(tmp_path.glob("*.partial"))] == ["a", "b"]
    disk.write(tmp_path / "a", b"new")
    assert [path.name[0] for path in sorted(tmp_path.glob("*.partial"))] == ["b"]


@pytest.mark.parametrize("number", range(1, 8))
def test_a_kill_leaves_the_old_file_or_nothing_but_the_new_one(tmp_path: Path, number: int) -> None:
    """Whoever sees the new file need not write it again, so nothing would be cleaned."""
    (tmp_path / "a").write_bytes(b"old")
    elsewhere(f"""
events = iter(range(1, 99))
def hook(event, args):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"):
        if next(events) == {number}: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
disk.write(Path({str(tmp_path / "a")!r}), b"new")
""")
    if (tmp_path / "a").read_bytes() == b"new":
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_another_machine_is_writing_is_left_alone_for_long(tmp_path: Path) -> None:
    theirs = tmp_path / "a.0-1.partial"
    theirs.mkdir()
    disk.write(tmp_path / "a", b"")
    assert theirs.is_dir()
    os.utime(theirs, (theirs.stat().st_mtime - 2 * disk.LONG_S,) * 2)
    disk.write(tmp_path / "a", b"")
    assert not theirs.exists()


def test_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    models.save_weights(tmp_path / "weights.safetensors", torch.nn.Linear(2, 2), {})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
