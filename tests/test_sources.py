import os
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from dop_fast import images
from dop_fast.config import DataConfig
from dop_fast.errors import DataError


def opened(
    path: Path | str, size: int = 32, seed: int = 0, share: float = 0.2
) -> tuple[images.ImageSet, images.ImageSet]:
    return images.open_images(DataConfig(str(path), size, share), Path("/nowhere"), seed)


def zipped(folder: Path, to: Path, prefix: str = "", method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(to, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + str(path.relative_to(folder)))
    return to


def test_a_folder_of_train_and_val_is_read_in_order(tiny_images: Path) -> None:
    reference = torchvision.datasets.ImageFolder(tiny_images / "train")
    train, val = opened(tiny_images)
    assert list(train.classes) == reference.classes
    assert train.labels.tolist() == reference.targets
    assert [str(tiny_images / "train" / name) for name in train.names] == [
        path for path, _ in reference.samples
    ]
    assert (len(train), len(val)) == (36, 18)
    assert val.of_class(1).tolist() == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("prefix", ["", "flowers/", "a/b/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_reads_as_its_folder(
    tiny_images: Path, tmp_path: Path, prefix: str, method: int
) -> None:
    archive = zipped(tiny_images, tmp_path / "set.zip", prefix, method)
    for folder, zipped_set in zip(opened(tiny_images), opened(archive), strict=True):
        assert zipped_set.names == folder.names
        assert zipped_set.fingerprint == folder.fingerprint
        assert np.array_equal(zipped_set.labels, folder.labels)
        everything = range(len(folder))
        assert np.array_equal(zipped_set.load(everything), folder.load(everything))


def test_image_sets_travel_to_other_processes_and_threads(
    tiny_images: Path, tmp_path: Path
) -> None:
    for path in (tiny_images, zipped(tiny_images, tmp_path / "set.zip")):
        train, _ = opened(path)
        expected = train.load(range(36))
        travelled = pickle.loads(pickle.dumps(train))
        with ThreadPoolExecutor(8) as pool:
            loads = list(pool.map(lambda _, s=travelled: s.load(range(36)), range(16)))
        assert all(np.array_equal(load, expected) for load in loads)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on, with threads
def test_a_loader_with_workers_reads_a_zip(tiny_images: Path, tmp_path: Path) -> None:
    train, _ = opened(zipped(tiny_images, tmp_path / "set.zip"))

    class Rows(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return len(train)

        def __getitem__(self, row: int) -> Tensor:
            return torch.from_numpy(train.load([row])[0])

    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=9, num_workers=2, multiprocessing_context="fork"
    )
    assert np.array_equal(torch.cat(list(loader)).numpy(), train.load(range(36)))


def test_one_folder_of_classes_is_split_by_the_seed(tiny_images: Path) -> None:
    def split(seed: int) -> tuple[set[str], set[str]]:
        train, val = opened(tiny_images / "train", seed=seed, share=0.25)
        assert np.bincount(train.labels).tolist() == [9, 9, 9]
        assert np.bincount(val.labels).tolist() == [3, 3, 3]
        assert all(
            name.startswith(val.classes[label])
            for name, label in zip(val.names, val.labels, strict=True)
        )
        return set(train.names), set(val.names)

    train, val = split(1)
    assert not train & val
    assert len(train | val) == 36
    assert split(1) == (train, val)
    assert split(2) != (train, val)


def test_a_new_class_does_not_move_the_others(tiny_copy: Path) -> None:
    _, before = opened(tiny_copy / "train")
    shutil.copytree(tiny_copy / "train" / "red", tiny_copy / "train" / "amber")
    _, after = opened(tiny_copy / "train")
    assert set(before.names) == {name for name in after.names if not name.startswith("amber")}


def test_every_class_of_two_images_keeps_one_on_each_side(tiny_copy: Path) -> None:
    for path in (tiny_copy / "train").glob("*/*.png"):
        if path.stem > "01":
            path.unlink()
    for share in (0.01, 0.99):
        assert [
            np.bincount(part.labels).tolist() for part in opened(tiny_copy / "train", share=share)
        ] == [[1, 1, 1]] * 2


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_held_out_images_go_by_other_names_too(tiny_copy: Path, name: str) -> None:
    (tiny_copy / "val").rename(tiny_copy / name)
    assert [len(part) for part in opened(tiny_copy)] == [36, 18]


def test_junk_is_passed_over_and_links_are_followed(tiny_copy: Path, tmp_path: Path) -> None:
    expected = [part.names for part in opened(tiny_copy)]
    for junk in (".DS_Store", "._00.png", "notes.txt", "Thumbs.db"):
        (tiny_copy / "train" / "red" / junk).write_bytes(b"junk")
    for folder in (".git", "__MACOSX"):
        (tiny_copy / "train" / folder).mkdir()
        (tiny_copy / "train" / folder / "x.png").write_bytes(b"junk")
    (tiny_copy / "stray.png").write_bytes(b"junk")
    (tiny_copy / "train" / "red" / "loop").symlink_to(tiny_copy)
    (tiny_copy / "train" / "red" / "gone.png").symlink_to(tiny_copy / "gone.png")
    moved = shutil.move(tiny_copy / "train" / "blue", tmp_path / "elsewhere")
    (tiny_copy / "train" / "blue").symlink_to(moved)
    found = opened(tiny_copy)
    assert [part.names for part in found] == expected
    assert found[0].load([0]).any()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


BROKEN = {
    "only one class": lambda root: [
        shutil.rmtree(root / part / name) for part in ("train", "val") for name in ("red", "green")
    ],
    "the class green has no images": lambda root: empty(root / "train" / "green"),
    "only in train: red": lambda root: shutil.rmtree(root / "val" / "red"),
    "no folders of images": lambda root: [empty(folder) for folder in (root / "train").iterdir()],
}


@pytest.mark.parametrize("message", BROKEN)
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_broken_tree_is_told(tiny_copy: Path, tmp_path: Path, message: str, as_zip: bool) -> None:
    BROKEN[message](tiny_copy)
    path = zipped(tiny_copy, tmp_path / "set.zip") if as_zip else tiny_copy
    with pytest.raises(DataError, match=message) as caught:
        opened(path)
    assert caught.value.hint


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_folders_around_the_set_are_passed_through(
    tiny_images: Path, tmp_path: Path, depth: int, as_zip: bool
) -> None:
    around = tmp_path.joinpath("around", *["ILSVRC", "Data", "CLS-LOC"][:depth])
    shutil.copytree(tiny_images, around)
    outer = tmp_path / "around"
    path = zipped(outer, tmp_path / "set.zip") if as_zip else outer
    for part, wanted in zip(opened(path), opened(tiny_images), strict=True):
        assert (part.names, part.fingerprint) == (wanted.names, wanted.fingerprint)


@pytest.mark.parametrize("as_zip", [False, True])
def test_validation_images_in_no_folders_as_imagenet_s_come_are_told(
    tiny_copy: Path, tmp_path: Path, as_zip: bool
) -> None:
    val = tiny_copy / "val"
    for number, path in enumerate(sorted(val.rglob("*.png"))):
        path.rename(val / f"ILSVRC2012_val_{number + 1:08}.png")
    for folder in [path for path in val.iterdir() if path.is_dir()]:
        folder.rmdir()
    path = zipped(tiny_copy, tmp_path / "set.zip") if as_zip else tiny_copy
    with pytest.raises(DataError, match=r"18 images, such as ILSVRC2012_val_00000001") as caught:
        opened(path)
    assert "valprep.sh" in caught.value.hint


def test_a_class_too_small_to_split_is_told(tiny_copy: Path) -> None:
    for path in sorted((tiny_copy / "train" / "green").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match="green has fewer than two"):
        opened(tiny_copy / "train")


@pytest.mark.parametrize(
    ("path", "hint"), [("", "CIFAR10"), ("gone", "folder"), ("CIFAR11", "CIFAR10")]
)
def test_missing_data_gets_a_hint(tmp_path: Path, path: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        images.open_images(DataConfig(path), tmp_path, 0)
    assert hint in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 100])
def test_a_file_that_is_no_zip_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(DataError, match="readable zip"):
        opened(tmp_path / "set.zip")


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "train/../../x.png", "C:/x.png", "..\\x.png"]
)
def test_a_zip_with_a_member_outside_of_itself_is_refused(
    tiny_images: Path, tmp_path: Path, name: str
) -> None:
    archive = zipped(tiny_images, tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"")
    with pytest.raises(DataError, match="outside"):
        opened(archive)


def test_a_zip_in_a_rare_compression_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rare compression"):
        opened(zipped(tiny_images, tmp_path / "set.zip", method=zipfile.ZIP_LZMA))


def test_a_zip_changed_behind_our_back_is_told(tiny_images: Path, tmp_path: Path) -> None:
    archive = zipped(tiny_images, tmp_path / "set.zip")
    train, _ = opened(archive)
    content = bytearray(archive.read_bytes())
    content[len(content) // 3 :: 50] = bytes(len(content[len(content) // 3 :: 50]))
    archive.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the image"):
        train.load(range(36))


def test_a_fingerprint_follows_names_bytes_size_and_classes(tiny_copy: Path) -> None:
    marks = {opened(tiny_copy)[0].fingerprint}
    os.utime(tiny_copy / "train" / "red" / "00.png", (0, 0))
    assert opened(tiny_copy)[0].fingerprint in marks
    marks.add(opened(tiny_copy)[1].fingerprint)
    marks.add(opened(tiny_copy, 40)[0].fingerprint)
    (tiny_copy / "train" / "red" / "00.png").rename(tiny_copy / "train" / "red" / "99.png")
    marks.add(opened(tiny_copy)[0].fingerprint)
    with (tiny_copy / "train" / "red" / "99.png").open("ab") as file:
        file.write(b"more")
    marks.add(opened(tiny_copy)[0].fingerprint)
    for part in ("train", "val"):
        (tiny_copy / part / "red").rename(tiny_copy / part / "scarlet")
    marks.add(opened(tiny_copy)[0].fingerprint)
    assert len(marks) == 6


class Toy(torchvision.datasets.VisionDataset):
    classes = ("zebra", "ant")

    def __init__(self, root: Path, count: int) -> None:
        super().__init__(root)
        self.targets = [i % 2 for i in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.new("L", (20, 20), row), self.targets[row]


class WithTrain(Toy):
    def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
        super().__init__(root, 12 if train and download else 6)


class WithSplit(Toy):
    def __init__(self, root: Path, split: str = "train") -> None:
        if split not in ("trainval", "test"):
            raise ValueError("unknown split")
        super().__init__(root, 12 if split == "trainval" else 6)


class Whole(Toy):
    def __init__(self, root: Path) -> None:
        super().__init__(root, 18)


@pytest.mark.parametrize("kind", [WithTrain, WithSplit, Whole])
def test_torchvision_sets_are_opened_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type
) -> None:
    monkeypatch.setattr(torchvision.datasets, "Toy", kind, raising=False)
    train, val = images.open_images(DataConfig("Toy", 16, 1 / 3), tmp_path, 0)
    assert train.classes == val.classes == ("zebra", "ant")
    assert (len(train), len(val)) == (12, 6)
    for part in (train, val):
        rows = np.array([int(name) for name in part.names])
        assert np.array_equal(part.labels, rows % 2)
        assert np.array_equal(part.load(range(len(part)))[:, 0, 0, 0], rows)
        assert np.array_equal(part.labels[part.of_class(1)], np.ones(len(part) // 2))
    (tmp_path / "Toy").mkdir()
    with pytest.raises(DataError, match="no folders of images"):  # a path goes first
        images.open_images(DataConfig("Toy", 16), tmp_path, 0)


def test_a_failed_download_says_where_to_put_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match="no route") as caught:
        images.open_images(DataConfig("CIFAR10", 32), tmp_path, 0)
    assert str(tmp_path / "data") in caught.value.hint


def test_a_set_without_one_class_for_each_image_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Boxes(Whole):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.targets = [[0, 1]] * 18

    monkeypatch.setattr(torchvision.datasets, "Boxes", Boxes, raising=False)
    with pytest.raises(DataError, match="one class"):
        images.open_images(DataConfig("Boxes", 16), tmp_path, 0)
