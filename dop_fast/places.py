"""Where a Zarr store lies: in a folder, or at an fsspec address such as `s3://bucket/x.zarr`.

What is written into a folder gets its final name when it is finished. Elsewhere nothing can be
renamed: it is written in place, and only the attribute `finished`, written last, makes it count.
"""

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.api.asynchronous import open_array
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from dop_fast.errors import StoreError
from dop_fast.settings import is_remote
from dop_fast.types import Array

WHOLE: ArrayConfigParams = {"write_empty_chunks": True}
"""How arrays are written, so that a file that is missing is damage and not zeros."""
SEAL = "crc32c"
# what Zarr, its codecs and NumPy raise for files that are damaged or missing
DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    MemoryError, FileNotFoundError, UserWarning,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """One group in one store; `name` is its path in there, empty for the whole store."""

    address: str | Path
    name: str = ""

    def __str__(self) -> str:
        return f"{self.address}/{self.name}" if self.name else str(self.address)

    def __truediv__(self, name: str) -> "Place":
        return Place(self.address, f"{self.name}/{name}" if self.name else name)

    @cached_property
    def store(self) -> Store:
        """The store that Zarr reads and writes."""
        if not is_remote(self.address):
            return LocalStore(Path(self.address))
        try:
            return FsspecStore.from_url(str(self.address))
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"cannot open {self.address}: {error}",
                "install fsspec's package for it, such as s3fs or gcsfs, or name a folder",
            ) from error

    @property
    def folder(self) -> Path | None:
        """The folder, where there is one."""
        return None if is_remote(self.address) else Path(self.address) / self.name

    def exists(self) -> bool:
        """Return whether anything is there."""
        return self.folder.exists() if self.folder else not sync(self.store.is_empty(self.name))

    def group(
        self, mode: Literal["r", "a"] = "r", attributes: dict[str, Any] | None = None
    ) -> zarr.Group:
        """Open the group; mode "a" makes it, with these attributes, where it is not."""
        return zarr.open_group(
            self.store, path=self.name, mode=mode, zarr_format=3, attributes=attributes
        )

    def read(self, names: Sequence[str]) -> dict[str, Array]:
        """Return arrays of the group, read at the same time: one by one takes twice as long."""

        async def one(name: str) -> Array:
            array = await open_array(store=self.store, path=f"{self.name}/{name}", mode="r")
            await _refuse_gaps(self.store, array)
            return np.asarray(await array.getitem(...))

        async def every() -> list[Array]:
            return await asyncio.gather(*map(one, names))

        return dict(zip(names, sync(every()), strict=True))

    def refuse_gaps(self, array: "zarr.Array[Any]") -> None:
        """Raise ValueError where the array lacks a file, which Zarr would read as zeros."""
        sync(_refuse_gaps(self.store, array))

    def attributes(self) -> dict[str, Any]:
        """Return the group's attributes; none where there is no group. ValueError: damaged."""
        try:
            return {key: value for key, value in self.group().attrs.items() if key != SEAL}
        except FileNotFoundError:
            return {}

    def seal(self) -> None:
        """Let the group count as finished, with a checksum of its attributes and arrays' metadata.

        What arrays hold has checksums of its own.
        """
        self.group("a").attrs.update({"finished": True, SEAL: self._checksum()})

    def broken(self) -> bool:
        """Return whether the metadata of a sealed group are no longer those that were sealed."""
        return bool(self.group().attrs.get(SEAL) != self._checksum())

    def _checksum(self) -> str:
        group = self.group()
        said = {key: group.attrs[key] for key in group.attrs if key not in ("finished", SEAL)}
        checksum = google_crc32c.value(json.dumps(said, sort_keys=True).encode())
        for name in sorted(group.array_keys()):
            path = "/".join(filter(None, (self.name, name, "zarr.json")))
            content = sync(self.store.get(path, default_buffer_prototype()))
            if content is not None:
                checksum = google_crc32c.extend(checksum, content.to_bytes())
        return f"{checksum:08x}"

    def begin(self) -> "Place":
        """Return where to write what will be here once it is finished.

        Nobody else may be writing to the store: what killed writers left is removed.
        """
        if self.folder is None:
            return self
        begun = self._beside("")
        for path in (
            *Path(begun.address).glob("*.partial"),
            *Path(begun.address).glob("*/*.partial"),
        ):
            if path.is_file():  # Zarr's own: metadata that did not get their name
                path.unlink()
        return begun

    def _beside(self, mark: str) -> "Place":
        if self.name:
            return Place(self.address, f"{self.name}{mark}.partial")
        path = Path(self.address)
        return Place(path.with_name(f"{path.name}{mark}.partial"))

    def remove(self) -> None:
        """Remove what is there, if there is anything."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.exists():
            if self.attributes():
                self.group("a").attrs["finished"] = False  # in case the removal is interrupted
            sync(self.store.delete_dir(self.name))

    def finish(self, begun: "Place") -> None:
        """Declare what was begun finished, and put it here in place of what was here."""
        begun.seal()
        if self.folder and begun.folder:
            old = self._beside(".old")  # at once, so that no half of it is ever here
            old.remove()
            if self.exists() and old.folder:
                self.folder.rename(old.folder)
            begun.folder.rename(self.folder)
            old.remove()


async def _refuse_gaps(store: Store, array: Any) -> None:
    size = array.shards or array.chunks
    for at in np.ndindex(*(-(-n // m) for n, m in zip(array.shape, size, strict=True))):
        key = f"{array.path}/{array.metadata.encode_chunk_key(at)}"
        if not await store.exists(key):
            raise ValueError(f"{key} is missing")


@contextmanager
def reading(place: Place, hint: str) -> Iterator[None]:
    """Turn what damage makes Zarr raise into StoreError."""
    try:
        yield
    except DAMAGE as error:
        raise StoreError(f"{place} is damaged: {error}", hint) from error


def take(values: "zarr.Array[Any]", index: Array | None) -> Array:
    """Return rows of an array; one by one, since Zarr's own way takes several times as long."""
    if index is None or values.ndim == 1 or values.nchunks == 1:
        whole = np.asarray(values[:])
        return whole if index is None else whole[index]
    taken = np.empty((len(index), *values.shape[1:]), values.dtype)
    for place, row in enumerate(index):
        taken[place] = values[int(row)]
    return taken
