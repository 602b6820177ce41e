"""The Zarr store of an extraction: every class's segments and concepts, and stitched patches.

Layout of `patches.zarr` (Zarr v3), schema `dopfast.patches`, version 1:
    classes/<class id>/           segments of the class, see `types.Segments`
        image box resolution offset bits
        members members_offset    concepts' members one after the other, best concept first
        tcav_runs p_value cav_accuracy
        colours                   what the members show, uint8[...  3], in ascending order
    stitched/                     pixels valid label reached visible, see `types.Patches`
What is written counts once it is `finished`, see `places`. Every chunk carries its checksum.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from dop_fast import __version__, places, shards
from dop_fast.errors import StoreError
from dop_fast.places import Place, reading, take
from dop_fast.types import Array, ClassConcepts, Concept, Patches, Segments

SCHEMA, VERSION = "dopfast.patches", 1
SEGMENT_COLUMNS = ("image", "box", "resolution", "offset", "bits")
CONCEPT_COLUMNS = ("members", "members_offset", "tcav_runs", "p_value", "cav_accuracy")
COLUMNS = SEGMENT_COLUMNS + CONCEPT_COLUMNS
Load: TypeAlias = Callable[[Array], Array]
"""From indices int[k] into the image set to pixels uint8[k h w 3], as `ImageSet.load`."""
CLASSES = "classes"
CODEC = (BloscCodec(cname="lz4", clevel=5), Crc32cCodec())
CHUNK, SHARD = 4, 64
"""Stitched patches that are packed as one, and that are in one file."""
WRITERS = 2
"""Files written at the same time: one is packed while the other goes to the disk."""
AGAIN, STITCH_AGAIN = (
    "rebuild it: dopfast extract --force",
    "make them anew: dopfast stitch --force",
)


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

    def __init__(self, address: Path | str, header: Header) -> None:
        self._place = Place(address)
        if self._place.exists() and not _known(self._place):
            raise StoreError(f"{address} holds something else", "name another store, or remove it")
        self.partial = self._place.begin()
        attributes = _attributes(header)
        found = _known(self.partial)
        finished = found.pop("finished", False)
        # begun with other settings: nothing to go on with; finished under its own name: replaced
        if found != attributes or (finished and self.partial == self._place):
            self.partial.remove()
        self._root = self.partial.group("a", attributes)
        self._root.require_group(CLASSES)

    def done(self, class_id: int) -> bool:
        """Return whether the class is stored whole."""
        name = f"{CLASSES}/{class_id}"
        return name in self._root and bool(self._root[name].attrs.get("finished", False))

    def write(self, found: ClassConcepts, load: Load | None = None) -> None:
        """Store one class; it counts once its last attribute is written.

        With `load`, as `ImageSet.load`, the pixels of the concepts' segments are stored too, so
        that no image needs to be decoded again to stitch them.
        """
        name = f"{CLASSES}/{found.class_id}"
        group = self._root.create_group(name, overwrite=True)
        columns = {column: getattr(found.segments, column) for column in SEGMENT_COLUMNS}
        members = [concept.members for concept in found.concepts]
        columns["members"] = np.concatenate([np.empty(0, np.int32), *members])
        columns["members_offset"] = np.cumsum([0, *map(len, members)])
        runs = [concept.tcav_runs for concept in found.concepts]
        columns["tcav_runs"] = np.stack(runs) if runs else np.empty((0, 0))
        columns["p_value"] = np.array([concept.p_value for concept in found.concepts])
        columns["cav_accuracy"] = np.array([concept.cav_accuracy for concept in found.concepts])
        if load:
            columns["colours"] = _colours(found, load)
        for column, values in columns.items():
            whole = tuple(max(1, length) for length in values.shape)
            data = np.ascontiguousarray(values)
            group.create_array(
                column, data=data, chunks=whole, compressors=CODEC, config=places.WHOLE
            )
        (self.partial / name).seal()

    def finish(self) -> "PatchStore":
        """Let the store count, in place of an older one, and open it."""
        self._place.finish(self.partial)
        return PatchStore(self._place.address)


class PatchStore:
    """Read view of a finished store, in a folder or at an fsspec address."""

    def __init__(self, address: Path | str) -> None:
        self.path, self._place = address, Place(address)
        if not self._place.exists():
            raise StoreError(f"there is no store of patches at {address}", "run: dopfast extract")
        attributes = _read_attributes(self._place)
        if not attributes:
            raise StoreError(f"{address} is not a Zarr store", AGAIN)
        if attributes.get("schema") != SCHEMA or attributes.get("version") != VERSION:
            found = f"{attributes.get('schema')} version {attributes.get('version')}"
            raise StoreError(
                f"{address} is {found}, this dopfast reads {SCHEMA} version {VERSION}", AGAIN
            )
        if not attributes.get("finished"):
            raise StoreError(f"{address} is unfinished", AGAIN)
        with reading(self._place, AGAIN):
            self.header = _header(attributes["header"])

    def concepts(self, class_id: int) -> ClassConcepts:
        """Return one class's segments and concepts."""
        if not 0 <= class_id < len(self.header.classes):
            raise StoreError(f"{self.path} has no class {class_id}", AGAIN)
        place = self._place / f"{CLASSES}/{class_id}"
        with reading(place, AGAIN):
            column = place.read(COLUMNS)
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

    def sources(self, found: ClassConcepts) -> Load | None:
        """Return what loads the class's images where its concepts lie, 0 elsewhere.

        It decodes no image. None where the pixels are not stored.
        """
        place = self._place / f"{CLASSES}/{found.class_id}"
        with reading(place, AGAIN):
            if not (place / "colours").exists():
                return None
            colours = place.read(("colours",))["colours"]
        segments = _members(found)
        owner, flat = _spots(segments)

        def load(index: Array) -> Array:
            slots = {int(image): slot for slot, image in enumerate(index)}
            slot = np.array([slots.get(int(image), -1) for image in segments.image])[owner]
            pixels = np.zeros((len(index), *self.header.canvas, 3), np.uint8)
            asked = slot >= 0
            pixels.reshape(len(index), -1, 3)[slot[asked], flat[asked]] = colours[asked]
            return pixels

        return load

    @property
    def stitching(self) -> dict[str, Any] | None:
        """Return the settings of the stitched patches, or None where there are none."""
        with reading(self._stitched, STITCH_AGAIN):
            attributes = self._stitched.attributes()
        return attributes if attributes.pop("finished", False) else None

    @property
    def _stitched(self) -> Place:
        return self._place / "stitched"

    @cached_property
    def _all_stitched(self) -> None:
        """Raise ValueError, once, where the stitched patches lack a file: Zarr reads zeros then."""
        for _, values in self._stitched.group().arrays():
            self._stitched.refuse_gaps(values)

    def stitched(self, index: Array | None = None) -> Patches:
        """Return the stitched patches at `index` int[k], or all of them."""
        if self.stitching is None:
            raise StoreError(
                f"{self.path} has no stitched patches", "run: dopfast stitch --sigma 0.75"
            )
        height, width = self.header.canvas
        with reading(self._stitched, STITCH_AGAIN):
            _ = self._all_stitched
            pick = {key: take(values, index) for key, values in self._stitched.group().arrays()}
            valid = np.unpackbits(pick["valid"], axis=1, count=height * width)
            pick["valid"] = valid.reshape(-1, height, width).view(np.bool_)
            return Patches(**pick)

    def coverage(self) -> NDArray[np.float64]:
        """Return every stitched patch's share of valid pixels r, Eq. 6, reading no pixels."""
        height, width = self.header.canvas
        with reading(self._stitched, STITCH_AGAIN):
            bits: Any = self._stitched.group()["valid"]
            rows = range(0, bits.shape[0], 16 * SHARD)  # not at once: memory stays the same
            counts = [np.bitwise_count(bits[i : i + rows.step]).sum(axis=1) for i in rows]
        return np.concatenate(counts) / (height * width)

    def visible(self) -> NDArray[np.float64]:
        """Return the mean share of stitched patches that shows each concept, best first.

        float64[k]; for each rank the mean over the classes that have such a concept.
        """
        with reading(self._stitched, STITCH_AGAIN):
            visible = self._stitched.read(("visible",))["visible"]
        shares: NDArray[np.float64] = np.nanmean(visible, axis=0, dtype=np.float64)
        return shares

    def write_stitched(self, parts: Iterable[Patches], total: int, about: dict[str, Any]) -> None:
        """Store `total` stitched patches, handed over class by class, in place of older ones."""
        begun = self._stitched.begin()
        begun.remove()
        group = begun.group("a")
        arrays = _stitched_arrays(group, total, self.header.canvas)
        small: list[Patches] = []
        with ThreadPoolExecutor(WRITERS) as pool:
            waiting: deque[Future[None]] = deque()
            for number, shard in enumerate(_whole_shards(parts)):
                waiting.append(pool.submit(_write_shard, arrays, number, shard))
                if len(waiting) > WRITERS:
                    waiting.popleft().result()
                # copies: an empty view would keep all pixels in memory
                small += [
                    replace(part, pixels=part.pixels[:0].copy(), valid=part.valid[:0].copy())
                    for part in shard
                ]
            for written in waiting:
                written.result()
        joined = _joined(small)
        for name in ("label", "reached", "visible"):
            values = getattr(joined, name)
            if values is not None:
                group.create_array(name, data=values, compressors=CODEC, config=places.WHOLE)
        group.attrs.update(about)
        self._stitched.finish(begun)


def _members(found: ClassConcepts) -> Segments:
    """Return all segments of the class's concepts, in ascending order."""
    none = np.empty(0, np.int32)
    members = np.concatenate([none, *(concept.members for concept in found.concepts)])
    return found.segments.select(np.unique(members))


def _colours(found: ClassConcepts, load: Load) -> Array:
    segments = _members(found)
    images, image = np.unique(segments.image, return_inverse=True)
    owner, flat = _spots(segments)
    sources = load(images).reshape(len(images), -1, 3)
    return np.asarray(sources[image[owner], flat])


def _spots(segments: Segments) -> tuple[Array, Array]:
    """Return each pixel's segment and its place on the flat canvas, one segment after the other."""
    owner = np.repeat(np.arange(len(segments)), segments.area)
    bit = np.flatnonzero(np.unpackbits(segments.bits)) - 8 * segments.offset[owner]
    top, left, _, right = segments.box.astype(np.int64).T
    row, column = np.divmod(bit, (right - left)[owner])
    return owner, (top[owner] + row) * segments.canvas[1] + left[owner] + column


def exists(address: Path | str) -> bool:
    """Return whether a store is at the address, or something else, but no unfinished store."""
    place = Place(address)
    known = _known(place)
    return place.exists() and (not known or bool(known.get("finished")))


def _whole_shards(parts: Iterable[Patches]) -> Iterator[list[Patches]]:
    """Cut the parts anew, into views, so that each shard is written in one go."""
    held: list[Patches] = []
    missing = SHARD
    for part in parts:
        rest = part
        while len(rest) >= missing:
            yield [*held, _rows(rest, slice(missing))]
            rest, held, missing = _rows(rest, slice(missing, None)), [], SHARD
        if len(rest):
            held.append(rest)
            missing -= len(rest)
    if held:
        yield held


def _write_shard(
    arrays: dict[str, "zarr.Array[Any]"], number: int, parts: Sequence[Patches]
) -> None:
    shards.write(arrays["pixels"], number, [part.pixels for part in parts])
    valid = [np.packbits(part.valid.reshape(len(part), -1), axis=1) for part in parts]
    start = number * SHARD
    arrays["valid"][start : start + sum(map(len, parts))] = np.concatenate(valid)


def _joined(parts: list[Patches]) -> Patches:
    return Patches(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.valid for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.reached for part in parts]),
        _side_by_side([part.visible for part in parts if part.visible is not None]),
    )


def _side_by_side(parts: list[Array]) -> Array | None:
    """Return tables one below the other, with NaN where one has fewer columns."""
    width = max((part.shape[1] for part in parts), default=0)
    wide = [
        np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan) for part in parts
    ]
    return np.concatenate(wide) if wide else None


def _rows(patches: Patches, rows: slice) -> Patches:
    return Patches(
        patches.pixels[rows],
        patches.valid[rows],
        patches.label[rows],
        patches.reached[rows],
        None if patches.visible is None else patches.visible[rows],
    )


def _stitched_arrays(
    group: zarr.Group, total: int, canvas: tuple[int, int]
) -> dict[str, "zarr.Array[Any]"]:
    height, width = canvas
    rows, packed = min(-(-total // CHUNK) * CHUNK, SHARD), -(-height * width // 8)
    # without `write_empty_chunks` each chunk is compared with zeros, which takes twice as long
    how: dict[str, Any] = {"compressors": shards.CODEC, "config": places.WHOLE}
    return {
        "pixels": group.create_array(
            "pixels", shape=(total, height, width, 3), dtype=np.uint8,
            chunks=(CHUNK, height, width, 3), shards=(rows, height, width, 3), **how,
        ),
        "valid": group.create_array(
            "valid", shape=(total, packed), dtype=np.uint8, chunks=(rows, packed), **how
        ),
    }  # fmt: skip


def _attributes(header: Header) -> dict[str, Any]:
    made = {**vars(header), "classes": list(header.classes), "canvas": list(header.canvas)}
    return {"schema": SCHEMA, "version": VERSION, "dopfast": __version__, "header": made}


def _header(made: dict[str, Any]) -> Header:
    """Return what `_attributes` made of it; raises TypeError or ValueError for anything else."""
    height, width = made["canvas"]
    classes = tuple(map(str, made["classes"]))
    return Header(**{**made, "classes": classes, "canvas": (int(height), int(width))})


def _read_attributes(place: Place) -> dict[str, Any]:
    with reading(place, AGAIN):
        return place.attributes()


def _known(place: Place) -> dict[str, Any]:
    """Return the attributes of a store, finished or not; none where there is no such thing."""
    try:
        found = _read_attributes(place)
    except StoreError:
        return {}
    return found if found.get("schema") == SCHEMA else {}
