"""Files that are there whole or not at all: written elsewhere, synced, renamed."""

import errno
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from filecmp import cmp
from pathlib import Path

from safetensors import SafetensorError

from dop_fast import claims
from dop_fast.errors import StoreError

FULL = errno.ENOSPC, errno.EDQUOT
LONG_S = 3600.0
"""No file takes so long to write: what another machine left for so long is nobody's."""


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path`; see `replacing`."""
    with replacing(path, len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """Give the name to write `size` bytes under; what is there afterwards becomes `path`.

    A kill or a power cut at any moment leaves the old file or the new one, and of several processes
    at once the last one's: each writes in a folder of its own, as safetensors makes files beside
    the one that it is asked for. StoreError where the disk is full; the old file stays then.
    """
    mine = f".{claims.owner()}.partial"
    if path.parent.name.endswith(mine):  # a part of what is being written whole
        yield path
        return
    if path.exists() and not (path.is_file() or path.is_dir()):  # /dev/null would be no more
        raise StoreError(f"{path} is no plain file", "name another file")
    folder = path.with_name(path.name + mine)
    partial, whole = folder / path.name, path.with_name(f"{path.name}.{claims.owner()}.w.partial")
    _clear(path)
    try:
        with _only_for_now(folder):
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors lets nobody else read what it writes
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(whole)
        whole.replace(path)  # last of all: were the folder still there, a kill would leave it
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            free = shutil.disk_usage(path.parent).free
            raise StoreError(
                f"the disk is full: {path} needs {size / 1e3:,.0f} kB, {free / 1e3:,.0f} are free",
                "make room and run the same command again: what was there is intact",
            ) from error
        if isinstance(error, OSError) and error.filename in (str(folder), str(partial), str(whole)):
            error.filename = str(path)  # what was meant to be written
        raise
    finally:
        with suppress(OSError):  # as a rule it is not there
            whole.unlink()
    _sync_folder(path.parent)


@contextmanager
def _only_for_now(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that had our number before us
    try:
        folder.mkdir()
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear(path: Path) -> None:
    """Remove what processes that were killed left of their attempts at `path`."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        owner = left.name[len(path.name) + 1 :].partition(".")[0]
        if claims.gone(owner) or _age(left) > LONG_S:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _age(left: Path) -> float:
    try:
        return time.time() - left.stat().st_mtime
    except FileNotFoundError:  # its process was done in this moment
        return 0.0


def refuse_other(path: Path, made: Path) -> None:
    """Raise StoreError where another file is at `path` already than was made to be there."""
    if path.exists() and not cmp(path, made, shallow=False):
        raise StoreError(
            f"there is another file {path} already", "replace it: --force, or name another file"
        )


def only_begun(folder: Path, name: str) -> bool:
    """Return whether the folder holds nothing, or attempts to write a file of that name alone."""
    return all(path.match(f"{name}.*.partial") for path in folder.iterdir())


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
