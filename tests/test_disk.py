import errno
import os
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
    assert happened == ["a.partial", "rename", tmp_path.name]
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


def test_another_failure_is_told_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    with pytest.raises(OSError) as caught:
        disk.write(tmp_path / "a", b"")
    assert caught.value.errno == errno.EISDIR


def test_weights_may_be_read_by_whom_other_files_may(tmp_path: Path) -> None:
    models.save_weights(tmp_path / "weights.safetensors", torch.nn.Linear(2, 2), {})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
