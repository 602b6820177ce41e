"""Where images come from: a folder of classes, a zip of one, or a torchvision data set.

A folder or a zip holds `train/<class>/...` and `val/<class>/...`, or the classes alone, of which
a share is then held out. Nothing is decoded here.
"""

import inspect
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torchvision
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from dop_fast.errors import DataError
from dop_fast.seeding import stream

HELD_OUT = ("val", "valid", "validation", "test")
# the readers of other kinds are little used, and that of EPS runs a program on the file
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST = 1 << 30
"""Bytes that a file of an image may have: the most pixels in 16 bits and four channels fit."""
MOST_PIXELS = 89_478_485
"""Pixels that an image may say it has, and what PIL warns of."""
Rows = NDArray[np.int64]


class Source(Protocol):
    """The images of one set; picklable, and used from several threads and processes at once."""

    def open(self, index: int) -> Image.Image:
        """Return an image, decoded or not."""

    def select(self, rows: Rows) -> Self:
        """Return the images at `rows`, in that order."""


@dataclass(frozen=True, eq=False)
class Part:
    """Training or held-out images; `sizes` are their bytes on disk, 0 where they have no file."""

    classes: tuple[str, ...]
    labels: Rows
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    source: Source

    def select(self, rows: Rows) -> "Part":
        """Return the images at `rows`, in that order."""
        names = tuple(self.names[row] for row in rows)
        sizes = tuple(self.sizes[row] for row in rows)
        return Part(self.classes, self.labels[rows], names, sizes, self.source.select(rows))


def open_tree(path: Path, share: float, seed: int) -> tuple[Part, Part]:
    """Return the training and the held-out images of a folder or a zip; raises DataError."""
    tree = _zip_tree(path) if path.is_file() else _folder_tree(path)
    while True:
        tops = tree.tops()
        held_out = next((name for name in HELD_OUT if name in tops), "")
        if "train" in tops and held_out:
            _check_sorted(tree.below(held_out))
            train, val = tree.below("train").part(), tree.below(held_out).part()
            _check_same_classes(set(train.classes), set(val.classes))
            check_full(train, 1)
            return train, val
        if len(tops) != 1 or not tree.below(tops[0]).folders:
            return hold_out(tree.part(), share, seed)
        tree = tree.below(tops[0])  # one folder around all the others


def vision_sets() -> dict[str, type[torchvision.datasets.VisionDataset]]:
    """Return torchvision's data sets by name."""
    return {
        name: kind
        for name, kind in vars(torchvision.datasets).items()
        if isinstance(kind, type) and issubclass(kind, torchvision.datasets.VisionDataset)
    }


def open_vision(name: str, folder: Path, share: float, seed: int) -> tuple[Part, Part]:
    """Return the training and held-out images of a torchvision data set, kept in `folder`.

    It is downloaded if it is not there. Raises DataError.
    """
    kind = vision_sets()[name]
    try:
        parts = [_vision_part(dataset) for dataset in _vision_splits(kind, folder)]
    except (RuntimeError, OSError, ImportError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot open torchvision's {name}: {error}",
            f"put its files into {folder}, or give a folder of classes",
        ) from error
    return (parts[0], parts[1]) if len(parts) == 2 else hold_out(parts[0], share, seed)


def hold_out(part: Part, share: float, seed: int) -> tuple[Part, Part]:
    """Split off `share` of each class, at least one image and not all; the order is kept."""
    check_full(part, 2)
    out = np.zeros(len(part.labels), dtype=np.bool_)
    for class_id, name in enumerate(part.classes):
        rows = np.flatnonzero(part.labels == class_id)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        # the class's own stream: a class added to the folder does not move the others' images
        out[stream(seed, "split", name).permutation(rows)[:count]] = True
    return part.select(np.flatnonzero(~out)), part.select(np.flatnonzero(out))


def _check_same_classes(train: set[str], val: set[str]) -> None:
    only = {"train": sorted(train - val), "the held-out images": sorted(val - train)}
    found = [f"only in {part}: {', '.join(names[:5])}" for part, names in only.items() if names]
    if found:
        raise DataError(
            f"train and held-out classes differ ({'; '.join(found)})", "give both the same folders"
        )


def _check_sorted(tree: "_Tree") -> None:
    """Refuse images beside the folders of classes, as ILSVRC's validation images come."""
    loose = [name for name in tree.files if "/" not in name]
    if loose and not tree.folders:
        raise DataError(
            f"{tree.where} holds {len(loose)} images, such as {min(loose)}, in no class's folder",
            "move each into the folder of its class, named as in train (for ImageNet: valprep.sh), "
            "or take val away: a share of train is held out then",
        )


def check_full(part: Part, least: int) -> None:
    """Raise DataError where a class has fewer than `least` images."""
    counts = np.bincount(part.labels, minlength=len(part.classes))
    if counts.min() < least:
        need = "no images" if least == 1 else "fewer than two images, too few to hold one out"
        raise DataError(
            f"the class {part.classes[counts.argmin()]} has {need}",
            "add images to its folder, or remove the folder",
        )


@dataclass(frozen=True)
class _Folder:
    root: Path
    names: tuple[str, ...]

    def open(self, index: int) -> Image.Image:
        path = self.root / self.names[index]
        refuse_large(path.stat().st_size)
        return opened(path.read_bytes())

    def select(self, rows: Rows) -> "_Folder":
        return _Folder(self.root, tuple(self.names[row] for row in rows))


@dataclass(frozen=True, eq=False)
class _Zip:
    """Members of a zip by their place in it; every read opens the file anew.

    So threads, forked workers and pickles share no handle, and none of them reads the directory
    again, which takes seconds for a million images. `members` int64[n 5]: offset of the local
    header, bytes stored, bytes unpacked, method, checksum.
    """

    path: Path
    members: Rows

    def open(self, index: int) -> Image.Image:
        offset, stored, size, method, checksum = map(int, self.members[index])
        refuse_large(max(stored, size))
        with self.path.open("rb") as file:
            file.seek(offset)
            signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
            file.seek(name + extra, os.SEEK_CUR)
            content = file.read(stored)
        if method == zipfile.ZIP_DEFLATED:
            # no more than it says: a few bytes can unpack to any number of them
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(size, 1))
        if signature != b"PK\x03\x04" or zlib.crc32(content) != checksum:
            raise ValueError(f"its bytes in {self.path} are damaged")
        return opened(content)

    def select(self, rows: Rows) -> "_Zip":
        return _Zip(self.path, self.members[rows])


@dataclass(frozen=True, eq=False)
class _Vision:
    dataset: Any
    rows: Rows

    def open(self, index: int) -> Image.Image:
        image = self.dataset[int(self.rows[index])][0]
        if not isinstance(image, Image.Image):
            raise TypeError(f"the data set gives {type(image).__name__}, not an image")
        return image

    def select(self, rows: Rows) -> "_Vision":
        return _Vision(self.dataset, self.rows[rows])


@dataclass(frozen=True)
class _Tree:
    """Image files by path below `where`, with their bytes, and all folders, empty ones too."""

    where: Path
    files: dict[str, int]
    folders: frozenset[str]
    source: Callable[[tuple[str, ...]], Source]

    def tops(self) -> list[str]:
        return sorted({folder.partition("/")[0] for folder in self.folders})

    def below(self, folder: str) -> "_Tree":
        start = folder + "/"
        return _Tree(
            self.where / folder,
            {
                name.removeprefix(start): n
                for name, n in self.files.items()
                if name.startswith(start)
            },
            frozenset(name.removeprefix(start) for name in self.folders if name.startswith(start)),
            lambda names: self.source(tuple(start + name for name in names)),
        )

    def part(self) -> Part:
        """Return the files in folders, by class and name; DataError if there is nothing to tell."""
        classes = tuple(self.tops())
        number = {name: class_id for class_id, name in enumerate(classes)}
        found = sorted((name.partition("/")[0], name) for name in self.files if "/" in name)
        if not found:
            raise DataError(
                f"{self.where} has no folders of images", "give each class a folder of its images"
            )
        if len(classes) == 1:
            raise DataError(
                f"{self.where} has only one class: {classes[0]}",
                "give the folder that holds the folders of all classes",
            )
        labels = np.array([number[top] for top, _ in found], dtype=np.int64)
        names = tuple(name for _, name in found)
        sizes = tuple(self.files[name] for name in names)
        return Part(classes, labels, names, sizes, self.source(names))


def _folder_tree(root: Path) -> _Tree:
    files: dict[str, int] = {}
    folders: set[str] = set()

    def walk(folder: Path, prefix: str, above: frozenset[Path]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _is_content(entry.name):
                    continue
                if entry.is_symlink() and not Path(entry.path).exists():
                    continue  # a link to nowhere, or to itself
                if entry.is_dir():
                    inside = Path(entry.path).resolve()
                    if inside not in above:  # a link to a folder above it would never end
                        folders.add(prefix + entry.name)
                        walk(inside, f"{prefix}{entry.name}/", above | {inside})
                elif _is_image(entry.name) and entry.is_file():
                    files[prefix + entry.name] = entry.stat().st_size

    root = root.resolve()
    try:
        walk(root, "", frozenset({root}))
    except OSError as error:
        raise DataError(f"cannot read {root}: {error}", "check its permissions") from error
    return _Tree(root, files, frozenset(folders), lambda names: _Folder(root, names))


def _zip_tree(path: Path) -> _Tree:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.replace("\\", "/").removeprefix("./"): info
                for info in archive.infolist()
            }
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(
            f"{path} is neither a folder nor a readable zip: {error}",
            "give a folder of classes or a zip of one",
        ) from error
    files: dict[str, int] = {}
    folders: set[str] = set()
    for name, info in members.items():
        _check_member(path, name, info)
        parts = name.rstrip("/").split("/")
        if not all(map(_is_content, parts)):
            continue
        holders = parts if info.is_dir() else parts[:-1]
        folders.update("/".join(holders[: depth + 1]) for depth in range(len(holders)))
        if not info.is_dir() and _is_image(parts[-1]):
            files[name] = info.file_size

    def source(names: tuple[str, ...]) -> Source:
        infos = [members[name] for name in names]
        columns = [
            (i.header_offset, i.compress_size, i.file_size, i.compress_type, i.CRC) for i in infos
        ]
        return _Zip(path.resolve(), np.array(columns, dtype=np.int64).reshape(-1, 5))

    return _Tree(path, files, frozenset(folders), source)


def _check_member(path: Path, name: str, info: zipfile.ZipInfo) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        raise DataError(f"{path} has a member outside of itself: {name}", "zip the folder again")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{path} holds {name} encrypted or in a rare compression",
            "zip the folder again, without a password, stored or deflated",
        )


def refuse_large(size: int) -> None:
    """Raise ValueError for a file that no image needs to be as large as."""
    if size > LARGEST:
        raise ValueError(f"it has {size:,} bytes, more than the {LARGEST:,} that are read")


def opened(content: bytes) -> Image.Image:
    """Open a file, not decoded; ValueError where its header says too many pixels."""
    try:
        image = Image.open(BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"it says {image.width} x {image.height} pixels, more than the {MOST_PIXELS:,} that "
            "are decoded"
        )
    return image


def _is_content(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def _vision_splits(kind: Callable[..., Any], folder: Path) -> list[Any]:
    """Return the training and the held-out data set, or the one that knows no difference."""
    parameters = inspect.signature(kind).parameters
    options = {"download": True} if "download" in parameters else {}

    def first_of(*splits: str) -> Any:
        for split in splits[:-1]:
            try:
                return kind(folder, split=split, **options)
            except ValueError:  # not a split of this data set
                continue
        return kind(folder, split=splits[-1], **options)

    if "train" in parameters:
        return [kind(folder, train=True, **options), kind(folder, train=False, **options)]
    if "split" in parameters:
        return [first_of("train", "trainval"), first_of(*HELD_OUT)]
    return [kind(folder, **options)]


def _vision_part(dataset: Any) -> Part:
    labels = _vision_labels(dataset)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
        raise ValueError("it does not give each image one class")
    count = int(labels.max()) + 1
    known = getattr(dataset, "classes", range(count))
    classes = tuple(", ".join(c) if isinstance(c, tuple) else str(c) for c in known)
    rows = np.arange(len(labels))
    names = tuple(map(str, rows))
    return Part(classes, labels.astype(np.int64), names, (0,) * len(rows), _Vision(dataset, rows))


def _vision_labels(dataset: Any) -> NDArray[Any]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute))
    return np.asarray([dataset[row][1] for row in range(len(dataset))])  # decodes every image
