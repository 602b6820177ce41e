"""Fixtures that every test may use: the real data, where there is any, and a tiny made-up set."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_space import Run, Told

from dop_fast.cli.main import main

REPOSITORY = Path(__file__).resolve().parent.parent
TINT = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


torch.set_num_threads(1)  # now: fixtures of a module come before any of a function


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Fail where PyTorch's number of threads changes: bits do with it."""
    yield
    assert torch.get_num_threads() == 1


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of real images and weights; skip where there is none."""
    given = os.environ.get("DOPFAST_DATA")
    folder = Path(given) if given else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: set DOPFAST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ImageFolder of 3 classes, 12 train + 6 val PNGs each, 40 x 48 px (h x w).

    A class is told by its colour and by the direction of its stripes.
    """
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for class_id, name in enumerate(TINT):
        for part, count in (("train", 12), ("val", 6)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                _striped(class_id, rng).save(folder / f"{index:02d}.png")
    return root


@pytest.fixture
def tiny_copy(tiny_images: Path, tmp_path: Path) -> Path:
    """Return a copy of `tiny_images` that the test may change."""
    return shutil.copytree(tiny_images, tmp_path / "copy")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a caller of `dopfast` in this process; what is no known failure is raised."""

    def called(*arguments: str | Path) -> Told:
        monkeypatch.setattr("sys.argv", ["dopfast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Told(code, *capsys.readouterr())

    return called


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 1 MB; skip where we may not mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _striped(class_id: int, rng: np.random.Generator) -> Image.Image:
    """Return stripes of one tint, slanted by 60 degrees for each class, at a random phase."""
    y, x = np.mgrid[:40, :48]
    angle = class_id * np.pi / 3
    along = x * np.cos(angle) + y * np.sin(angle)
    wave = 0.75 + 0.25 * np.sin(along * 2 * np.pi / 9 + rng.uniform(0, 2 * np.pi))
    tint = np.array(list(TINT.values())[class_id])
    pixels = wave[..., None] * tint + rng.normal(0, 8, (40, 48, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
