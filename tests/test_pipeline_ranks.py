"""What several ranks or threads make of a workspace: byte for byte what one makes."""

from pathlib import Path
from shutil import copytree

import pytest
import torch
from together import together

from dop_fast import models, pipeline, workspace
from dop_fast.concepts import Extractor
from dop_fast.config import ExtractConfig, PruneConfig, StitchConfig
from dop_fast.types import ClassConcepts

CPU = torch.device("cpu")
EXTRACT = ExtractConfig(
    images=6, tcav_images=4, n_segments=(6,), clusters=3, min_members=4, max_members=6,
    random_sets=3,
)  # fmt: skip
FOUR = pytest.param(4, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """A workspace whose teacher was not trained: its concepts are as good as any here."""
    root = tmp_path_factory.mktemp("space")
    pipeline.init(
        root, data=str(tiny_images), size=32, teacher="resnet20", model="", seed=0, force=False
    )
    models.save_weights(root / "teacher.safetensors", models.build("resnet20", 3, 0), {})
    return root


@pytest.fixture(scope="module")
def extracted(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone") / "space"
    copytree(begun, root)
    extract(root)
    return root


def extract(root: Path) -> None:
    pipeline.extract(workspace.load(root), EXTRACT, 0, CPU)


def prune(root: Path) -> str:
    config = PruneConfig(per_class=5, batch_size=4, material="patches")
    path, *_ = pipeline.prune(workspace.load(root), config, 0, CPU)
    return path.name


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by its path in there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("count", [2, FOUR])  # four ranks for three classes
def test_patches_are_byte_for_byte_those_of_one_process(
    extracted: Path, begun: Path, tmp_path: Path, count: int
) -> None:
    root = copytree(begun, tmp_path / "space")
    together(count, extract, root)
    assert files(root) == files(extracted)


def test_ranks_go_on_with_the_classes_that_are_left(
    extracted: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, of_class = copytree(begun, tmp_path / "space"), Extractor.extract

    def one_class(self: Extractor, class_id: int) -> ClassConcepts:
        if class_id:
            raise KeyboardInterrupt
        return of_class(self, class_id)

    monkeypatch.setattr(Extractor, "extract", one_class)
    with pytest.raises(KeyboardInterrupt):
        extract(root)
    together(2, extract, root)
    assert files(root) == files(extracted)


@pytest.mark.parametrize("count", [2, FOUR])
def test_a_mask_file_is_byte_for_byte_that_of_one_process(
    extracted: Path, tmp_path: Path, count: int
) -> None:
    alone, root = copytree(extracted, tmp_path / "alone"), copytree(extracted, tmp_path / "space")
    names = together(count, prune, root)
    assert names == [prune(alone)] * count
    assert files(root / "masks") == files(alone / "masks")
    assert together(2, prune, root) == names[:2]  # found, not made again


def whole(root: Path, threads: int) -> dict[str, bytes]:
    torch.set_num_threads(threads)
    try:
        extract(root)
        pipeline.stitch(workspace.load(root), StitchConfig(sigma=0.4, per_class=3), 0)
        prune(root)
    finally:
        torch.set_num_threads(1)
    return files(root)


def test_patches_and_masks_depend_on_no_number_of_threads(begun: Path, tmp_path: Path) -> None:
    one, *others = (whole(copytree(begun, tmp_path / f"{n}"), n) for n in (1, 2, 4))
    assert {path.partition("/")[0] for path in one} >= {"patches.zarr", "masks"}
    assert others == [one, one]
