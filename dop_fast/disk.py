"""Files that are there whole or not at all: written under another name, synced, renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dop_fast.errors import StoreError

FULL = errno.ENOSPC, errno.EDQUOT


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path`; see `replacing`."""
    with replacing(path, len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """Give the name to write `size` bytes under; what is there afterwards becomes `path`.

    A kill or a power cut at any moment leaves the old file or the new one. StoreError where the
    disk is full; the old file stays then.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors lets nobody else read what it writes
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"the disk is full: {path} needs {size / 1e3:,.0f} kB, {free / 1e3:,.0f} are free",
            "make room and run the same command again: what was there is intact",
        ) from error
    partial.replace(path)
    _sync_folder(path.parent)


def _is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"(os error {code})" in str(error) for code in FULL)  # Rust's way to say it


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
