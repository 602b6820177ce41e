"""Image sets with labels, decoded when asked for and never all at once."""

import difflib
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dop_fast.config import DataConfig
from dop_fast.errors import ConfigError, DataError
from dop_fast.saved import is_saved, open_saved
from dop_fast.settings import fingerprint
from dop_fast.sources import Part, Source, open_tree, open_vision, vision_sets

# what PIL raises for files that are damaged, of an unknown kind or absurdly large
UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
THREADS_FROM = 64 * 64  # pixels: below, most of the work holds Python's lock


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images. `labels` int64[n] index `classes`; `names` are relative paths or numbers."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    size: int
    fingerprint: str
    source: Source

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Return images as uint8[k size size 3]: shorter side to `size`, then the centre.

        Bilinear with antialiasing, as torchvision's classifiers are trained. Raises DataError.
        """
        pixels, failed = self.attempt(index)
        if failed:
            raise failed[min(failed)]
        return pixels

    def attempt(
        self, index: Sequence[int] | NDArray[np.integer[Any]]
    ) -> tuple[NDArray[np.uint8], dict[int, DataError]]:
        """Return what `load` does, and by row of it why an image cannot be read; it is black."""
        rows = [int(i) for i in index]
        pixels = np.zeros((len(rows), self.size, self.size, 3), np.uint8)
        failed: dict[int, DataError] = {}
        # as many threads as torch may use: DataLoader's workers are held to one
        threads = torch.get_num_threads() if self.size**2 >= THREADS_FROM else 1

        def every(start: int) -> None:
            for at in range(start, len(rows), threads):
                try:
                    pixels[at] = np.asarray(self._cropped(rows[at]))
                except DataError as error:
                    failed[at] = error

        if threads == 1:
            every(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(every, range(min(threads, len(rows)))))
        return pixels, failed

    def decode(self, index: int) -> Image.Image:
        """Return one image, upright, as RGB at its original size. Raises DataError."""
        return self._read(index, _rgb)

    def of_class(self, class_id: int) -> NDArray[np.int64]:
        """Return the sorted indices of a class's images, int64[m]."""
        return np.flatnonzero(self.labels == class_id)

    def _cropped(self, index: int) -> Image.Image:
        return self._read(index, lambda image: _centre(_rgb(_drafted(image, self.size)), self.size))

    def _read(self, index: int, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
        try:
            return finish(self.source.open(index))
        except UNREADABLE as error:
            raise DataError(
                f"cannot read the image {self.names[index]}: {error}", "remove or replace it"
            ) from error


def open_images(config: DataConfig, root: Path, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return the training images and the held-out ones; paths are seen from `root`.

    `config.path` is a folder or a zip if there is one, of Hugging Face's `save_to_disk` too, else
    the name of a torchvision data set, which is downloaded to `root/data`. Where nothing is held
    out, `config.val_share` of each class is, drawn from `seed`. Raises DataError, and ConfigError
    for the mean and std.
    """
    if len(config.mean) != 3 or len(config.std) != 3 or min(config.std) <= 0:
        raise ConfigError(
            f"mean and std need three numbers, std above 0: {config.mean}, {config.std}",
            "mend them in [data]",
        )
    path = root / Path(config.path).expanduser()
    if config.path and is_saved(path):
        parts = open_saved(path, config.val_share, seed)
    elif config.path and path.exists():
        parts = open_tree(path, config.val_share, seed)
    elif config.path in vision_sets():
        parts = open_vision(config.path, root / "data", config.val_share, seed)
    else:
        near = difflib.get_close_matches(config.path, vision_sets(), 1)
        raise DataError(
            f"there are no images at {config.path}" if config.path else "no images are given",
            f"did you mean torchvision's {near[0]}?"
            if near
            else "give a folder of classes, a zip of one, or a data set such as CIFAR10",
        )
    train, val = (_image_set(part, config) for part in parts)
    return train, val


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels / 255 - mean) / std as float32[n 3 h w], channels last, from uint8[n h w 3].

    On the device of `pixels`.
    """
    scale, shift = _scaling(tuple(mean), tuple(std), pixels.device)
    scaled = torch.addcmul(shift, pixels.to(torch.float32), scale)
    return scaled.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=8)  # sending them to a GPU waits for all that it has to do
def _scaling(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    colours = torch.tensor([mean, std], dtype=torch.float64)
    scale, shift = 1 / (255 * colours[1]), -colours[0] / colours[1]
    return scale.to(device, torch.float32), shift.to(device, torch.float32)


def _image_set(part: Part, config: DataConfig) -> ImageSet:
    mark = fingerprint(part.classes, part.labels.tolist(), part.names, part.sizes, config.size)
    return ImageSet(part.classes, part.labels, part.names, config.size, mark, part.source)


def _drafted(image: Image.Image, size: int) -> Image.Image:
    """Let a large JPEG be decoded at a fraction of its size, at least twice what is needed."""
    image.draft(None, (2 * size, 2 * size))
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image; alpha is dropped, as by torchvision's loader."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are floats of an unknown range")
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion saturates at 255
        wide = np.asarray(image).clip(0, 65535)
        image = Image.fromarray(np.round(wide / 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL's way to convert such a palette
    return image if image.mode == "RGB" else image.convert("RGB")


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Return size x size pixels, bit-identical to torchvision's Resize and CenterCrop."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if size * long > 100 * size * short:
        raise ValueError(f"{width} x {height} pixels are too narrow to crop")
    longer = int(size * long / short)
    wide, high = (size, longer) if width <= height else (longer, size)
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))
