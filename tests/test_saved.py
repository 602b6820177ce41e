"""Folders that Hugging Face's `datasets` made by `save_to_disk`."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dop_fast import images
from dop_fast.config import DataConfig
from dop_fast.errors import DataError
from dop_fast.images import ImageSet

CLASSES = ("blue", "green", "red")
LIBRARY = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def opened(path: Path) -> tuple[ImageSet, ImageSet]:
    return images.open_images(DataConfig(path=str(path), size=32), Path(), 0)


def split_of(folder: Path, columns: tuple[str, str] = ("image", "label")) -> Any:
    """Return the images below a folder of classes as a data set, files as they are."""
    datasets = pytest.importorskip("datasets")
    files = [(path, CLASSES.index(path.parent.name)) for path in sorted(folder.rglob("*.png"))]
    image, label = columns
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        image: [{"bytes": path.read_bytes(), "path": None} for path, _ in files],
        label: [number for _, number in files],
    }
    return datasets.Dataset.from_dict(rows, features=features)


@LIBRARY
@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_a_saved_set_gives_the_images_of_its_folder(
    tiny_images: Path, tmp_path: Path, held_out: str
) -> None:
    datasets = pytest.importorskip("datasets")
    columns = ("picture", "kind")
    parts = {
        "train": split_of(tiny_images / "train", columns),
        held_out: split_of(tiny_images / "val", columns),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for found, expected in zip(opened(tmp_path / "saved"), opened(tiny_images), strict=True):
        assert found.classes == expected.classes
        assert np.array_equal(found.labels, expected.labels)
        every = range(len(expected))
        assert np.array_equal(found.load(every), expected.load(every))
        travelled = pickle.loads(pickle.dumps(found))
        assert np.array_equal(travelled.load([3]), expected.load([3]))


@LIBRARY
def test_a_single_saved_split_is_divided(tiny_images: Path, tmp_path: Path) -> None:
    split_of(tiny_images / "train").save_to_disk(str(tmp_path / "saved"))
    train, val = opened(tmp_path / "saved")
    assert len(train) + len(val) == 36
    assert not set(train.names) & set(val.names)
    assert np.bincount(val.labels).tolist() == [2, 2, 2]  # a fifth of twelve


@LIBRARY
def test_other_images_have_another_fingerprint(tiny_images: Path, tmp_path: Path) -> None:
    whole = split_of(tiny_images / "train")
    whole.save_to_disk(str(tmp_path / "one"))
    order = [*range(1, 12), 0, *range(12, 36)]  # the labels stay as they are
    whole.select(order).save_to_disk(str(tmp_path / "two"))
    one, same, two = (opened(tmp_path / name)[0].fingerprint for name in ("one", "one", "two"))
    assert one == same != two


@LIBRARY
@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": "label"}, "has no train split: validation"),
        ({"train": "text"}, "no column of images and one of classes: image, text"),
        ({"train": "label", "validation": "fewer"}, "validation split of .* has 2 classes"),
        ({"train": "label", "validation": ""}, "cannot open .*saved"),
    ],
)
def test_a_saved_set_that_lacks_something_is_told(
    tiny_images: Path, tmp_path: Path, splits: dict[str, str], message: str
) -> None:
    datasets = pytest.importorskip("datasets")
    whole = split_of(tiny_images / "train")
    made = {
        "": whole.select([]),
        "label": whole,
        "fewer": whole.select(range(24)).cast_column(
            "label", datasets.ClassLabel(names=["blue", "green"])
        ),
        "text": whole.rename_column("label", "text").cast_column("text", datasets.Value("string")),
    }
    chosen = {name: made[column] for name, column in splits.items()}
    datasets.DatasetDict(chosen).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "saved")
    assert caught.value.hint


def test_without_the_library_the_way_to_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="which is not installed") as caught:
        opened(tmp_path)
    assert "dopfast[datasets]" in caught.value.hint
