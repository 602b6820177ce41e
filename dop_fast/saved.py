"""A data set that Hugging Face's `datasets` saved in a folder, by `save_to_disk`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dop_fast.errors import DataError
from dop_fast.sources import HELD_OUT, Part, Rows, check_full, hold_out, opened, refuse_large

MARKS = ("dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    """Return whether the folder is one of `save_to_disk`: of several splits, or of one."""
    return any((path / mark).is_file() for mark in MARKS)


def open_saved(path: Path, share: float, seed: int) -> tuple[Part, Part]:
    """Return the training and the held-out images, of which a share is held out if none are.

    Raises DataError, also where `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} was saved by Hugging Face's datasets, which is not installed",
            "run: pip install 'dopfast[datasets]'",
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, IndexError) as error:  # the last: a split is empty
        raise DataError(
            f"cannot open {path}: {error}", "save it again, by save_to_disk, with no empty split"
        ) from error
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    if "train" not in splits:
        raise DataError(f"{path} has no train split: {', '.join(splits)}", "name one of them train")
    train = _part(splits["train"], path)
    check_full(train, 1)
    held_out = next((name for name in HELD_OUT if name in splits), "")
    if not held_out:
        return hold_out(train, share, seed)
    val = _part(splits[held_out], path)
    if val.classes != train.classes:
        raise DataError(
            f"the {held_out} split of {path} has {len(val.classes)} classes, train has "
            f"{len(train.classes)}, or they are in another order",
            "give both the same ClassLabel feature",
        )
    return train, val


@dataclass(frozen=True, eq=False)
class _Saved:
    dataset: Any
    column: str
    rows: Rows

    def open(self, index: int) -> Image.Image:
        stored = self.dataset[int(self.rows[index])][self.column]
        content = stored["bytes"] or Path(stored["path"]).read_bytes()
        refuse_large(len(content))
        return opened(content)

    def select(self, rows: Rows) -> "_Saved":
        return _Saved(self.dataset, self.column, self.rows[rows])


def _part(dataset: Any, path: Path) -> Part:
    """Return a split: its images as the files that they were, and its labels."""
    import datasets

    kinds = {name: type(feature) for name, feature in dataset.features.items()}
    image, label = (
        next((name for name, kind in kinds.items() if kind is wanted), "")
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if not image or not label:
        raise DataError(
            f"{path} has no column of images and one of classes: {', '.join(kinds)}",
            "cast them to the features Image and ClassLabel",
        )
    labels = dataset.with_format("numpy", columns=[label])[:][label].astype(np.int64)
    if labels.size and labels.min() < 0:
        raise DataError(f"{path} has images without a class", "leave that split out")
    files = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    # the content's mark stands in the names, so that another set has another fingerprint
    names = tuple(f"{dataset._fingerprint}-{row}" for row in range(len(labels)))
    classes = tuple(dataset.features[label].names)
    source = _Saved(files, image, np.arange(len(labels)))
    return Part(classes, labels, names, (0,) * len(labels), source)
