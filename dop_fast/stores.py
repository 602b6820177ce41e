"""The Zarr store of an extraction: every class's segments and concepts, and stitched patches.

Layout of `patches.zarr` (Zarr v3), schema `dopfast.patches`, version 1:
    classes/<class id>/           segments of the class, see `types.Segments`
        image box resolution offset bits
        members members_offset    concepts' members one after the other, best concept first
        tcav_runs p_value cav_accuracy
    stitched/                     pixels valid label reached, see `types.Patches`
A store is made under `<name>.partial` and renamed when it is finished, and so is `stitched`.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from dop_fast import __version__
from dop_fast.errors import StoreError
from dop_fast.types import Array, ClassConcepts, Concept, Patches, Segments

SCHEMA, VERSION = "dopfast.patches", 1
SEGMENT_COLUMNS = ("image", "box", "resolution", "offset", "bits")
CODEC = BloscCodec(cname="lz4", clevel=5)
CHUNK, SHARD = 4, 64
"""Stitched patches that are packed as one, and that are in one file."""


@dataclass(frozen=True)
class Header:
    """What a store was made from; two stores with equal headers hold the same content."""

    classes: tuple[str, ...]
    canvas: tuple[int, int]
    fill: int
    data: str
    teacher: str
    layer: str
    config: dict[str, Any]


class PatchWriter:
    """Writes a store class by class; an interrupted one goes on with the class it lacks."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        attributes = _attributes(header)
        if self.partial.exists() and not _same(self.partial, attributes):
            shutil.rmtree(self.partial)  # begun with other settings: nothing to go on with
        self._root = zarr.open_group(self.partial, mode="a", zarr_format=3)
        self._root.attrs.update(attributes)

    def done(self, class_id: int) -> bool:
        """Return whether the class is stored whole."""
        name = f"classes/{class_id}"
        return name in self._root and bool(self._root[name].attrs.get("finished", False))

    def write(self, found: ClassConcepts) -> None:
        """Store one class; it counts once its last attribute is written."""
        name = f"classes/{found.class_id}"
        group = self._root.create_group(name, overwrite=True)
        columns = {column: getattr(found.segments, column) for column in SEGMENT_COLUMNS}
        members = [concept.members for concept in found.concepts]
        columns["members"] = np.concatenate([np.empty(0, np.int32), *members])
        columns["members_offset"] = np.cumsum([0, *map(len, members)])
        runs = [concept.tcav_runs for concept in found.concepts]
        columns["tcav_runs"] = np.stack(runs) if runs else np.empty((0, 0))
        columns["p_value"] = np.array([concept.p_value for concept in found.concepts])
        columns["cav_accuracy"] = np.array([concept.cav_accuracy for concept in found.concepts])
        for column, values in columns.items():
            group.create_array(column, data=np.ascontiguousarray(values), compressors=CODEC)
        group.attrs["finished"] = True

    def finish(self) -> "PatchStore":
        """Give the store its final name, in place of an older one, and open it."""
        self._root.attrs["finished"] = True
        if self.path.exists():
            shutil.rmtree(self.path)
        self.partial.rename(self.path)
        return PatchStore(self.path)


class PatchStore:
    """Read view of a finished store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise StoreError(f"there is no store of patches at {path}", "run: dopfast extract")
        attributes = _read_attributes(path)
        if attributes.get("schema") != SCHEMA or attributes.get("version") != VERSION:
            found = f"{attributes.get('schema')} version {attributes.get('version')}"
            raise StoreError(
                f"{path} is {found}, this dopfast reads {SCHEMA} version {VERSION}",
                "rebuild it: dopfast extract --force",
            )
        if not attributes.get("finished"):
            raise StoreError(f"{path} is unfinished", "rebuild it: dopfast extract --force")
        made = attributes["header"]
        self.header = Header(
            **{**made, "classes": tuple(made["classes"]), "canvas": tuple(made["canvas"])}
        )

    def _group(self, name: str) -> zarr.Group:
        return zarr.open_group(self.path / name, mode="r")

    def concepts(self, class_id: int) -> ClassConcepts:
        """Return one class's segments and concepts."""
        name = f"classes/{class_id}"
        if not (self.path / name).is_dir():
            raise StoreError(
                f"{self.path} has no class {class_id}", "rebuild it: dopfast extract --force"
            )
        column = {key: np.asarray(values[:]) for key, values in self._group(name).arrays()}
        segments = Segments(
            **{key: column[key] for key in SEGMENT_COLUMNS}, canvas=self.header.canvas
        )
        starts = column["members_offset"]
        concepts = tuple(
            Concept(
                members=column["members"][starts[i] : starts[i + 1]],
                tcav=float(column["tcav_runs"][i].mean()),
                tcav_runs=column["tcav_runs"][i],
                p_value=float(column["p_value"][i]),
                cav_accuracy=float(column["cav_accuracy"][i]),
            )
            for i in range(len(starts) - 1)
        )
        return ClassConcepts(class_id, segments, concepts)

    @property
    def stitching(self) -> dict[str, Any] | None:
        """Return the settings of the stitched patches, or None where there are none."""
        if not (self.path / "stitched").is_dir():
            return None
        return dict(self._group("stitched").attrs)

    def stitched(self, index: Array | None = None) -> Patches:
        """Return the stitched patches at `index` int[k], or all of them."""
        if self.stitching is None:
            raise StoreError(
                f"{self.path} has no stitched patches", "run: dopfast stitch --sigma 0.75"
            )
        group = self._group("stitched")
        pick = {key: _take(values, index) for key, values in group.arrays()}
        height, width = self.header.canvas
        valid = np.unpackbits(pick["valid"], axis=1, count=height * width)
        return Patches(
            pick["pixels"],
            valid.reshape(-1, height, width).view(np.bool_),
            pick["label"],
            pick["reached"],
        )

    def coverage(self) -> NDArray[np.float64]:
        """Return every stitched patch's share of valid pixels r, Eq. 6, reading no pixels."""
        bits = np.asarray(self._group("stitched")["valid"][:])  # type: ignore[index]
        height, width = self.header.canvas
        valid: NDArray[np.int64] = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
        return valid / (height * width)

    def write_stitched(self, parts: Iterable[Patches], total: int, about: dict[str, Any]) -> None:
        """Store `total` stitched patches, handed over class by class, in place of older ones."""
        final = self.path / "stitched"
        partial = self.path / "stitched.partial"
        shutil.rmtree(partial, ignore_errors=True)
        group = zarr.open_group(partial, mode="w", zarr_format=3)
        arrays = _stitched_arrays(group, total, self.header.canvas)
        label, reached = np.zeros(total, np.int64), np.zeros(total, np.bool_)
        start = 0
        for part in _whole_shards(parts):
            rows = slice(start, start + len(part))
            arrays["pixels"][rows] = part.pixels
            arrays["valid"][rows] = np.packbits(part.valid.reshape(len(part), -1), axis=1)
            label[rows], reached[rows] = part.label, part.reached
            start += len(part)
        arrays["label"][:], arrays["reached"][:] = label, reached
        group.attrs.update(about)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def _take(values: "zarr.Array[Any]", index: Array | None) -> Array:
    """Return rows of an array; one by one, since Zarr's own way takes several times as long."""
    if index is None or values.ndim == 1:
        whole = np.asarray(values[:])
        return whole if index is None else whole[index]
    taken = np.empty((len(index), *values.shape[1:]), values.dtype)
    for place, row in enumerate(index):
        taken[place] = values[int(row)]
    return taken


def _whole_shards(parts: Iterable[Patches]) -> Iterator[Patches]:
    """Cut the parts anew: a shard written in two goes is read and decoded in between."""
    held: list[Patches] = []
    for part in parts:
        held.append(part)
        count = sum(map(len, held))
        if count >= SHARD:
            joined, whole = _joined(held), count - count % SHARD
            yield _rows(joined, slice(whole))
            held = [_rows(joined, slice(whole, count))] if whole < count else []
    if held:
        yield _joined(held)


def _joined(parts: list[Patches]) -> Patches:
    return Patches(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.valid for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.reached for part in parts]),
    )


def _rows(patches: Patches, rows: slice) -> Patches:
    return Patches(
        patches.pixels[rows], patches.valid[rows], patches.label[rows], patches.reached[rows]
    )


def _stitched_arrays(
    group: zarr.Group, total: int, canvas: tuple[int, int]
) -> dict[str, "zarr.Array[Any]"]:
    height, width = canvas
    rows, packed = min(-(-total // CHUNK) * CHUNK, SHARD), -(-height * width // 8)
    # without `write_empty_chunks` each chunk is compared with zeros, which takes twice as long
    how: dict[str, Any] = {"compressors": CODEC, "config": {"write_empty_chunks": True}}
    return {
        "pixels": group.create_array(
            "pixels", shape=(total, height, width, 3), dtype=np.uint8,
            chunks=(CHUNK, height, width, 3), shards=(rows, height, width, 3), **how,
        ),
        "valid": group.create_array(
            "valid", shape=(total, packed), dtype=np.uint8, chunks=(rows, packed), **how
        ),
        "label": group.create_array("label", shape=(total,), dtype=np.int64),
        "reached": group.create_array("reached", shape=(total,), dtype=np.bool_),
    }  # fmt: skip


def _attributes(header: Header) -> dict[str, Any]:
    made = {**vars(header), "classes": list(header.classes), "canvas": list(header.canvas)}
    return {"schema": SCHEMA, "version": VERSION, "dopfast": __version__, "header": made}


def _read_attributes(path: Path) -> dict[str, Any]:
    try:
        return dict(zarr.open_group(path, mode="r").attrs)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StoreError(
            f"{path} is not a Zarr store: {error}", "rebuild it: dopfast extract --force"
        ) from error


def _same(partial: Path, attributes: dict[str, Any]) -> bool:
    try:
        return _read_attributes(partial) == attributes
    except StoreError:
        return False
