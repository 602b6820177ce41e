"""A small workspace on disk, for tests of what may go wrong with one."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NETWORK = """
from torch import nn

def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""
SETTINGS = """
seed = 0
[data]
path = "data"
size = 32
[teacher]
name = "net:small"
[model]
name = "net:small"
[extract]
images = 8
tcav_images = 4
n_segments = [6, 12]
clusters = 4
min_members = 4
max_members = 8
random_sets = 4
[stitch]
sigma = 0.5
per_class = 2
[prune]
criterion = "snip"
per_class = 2
[train]
epochs = 1
batch_size = 12
lr = 0.02
[finetune]
epochs = 1
batch_size = 12
lr = 0.02
"""
STAGES = ("train", "extract", "stitch", "prune", "finetune")


class Told(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


Run = Callable[..., Told]


def begin(root: Path, images: Path) -> None:
    """Make the workspace, its images inside of it; nothing is run."""
    shutil.copytree(images, root / "data")
    (root / "net.py").write_text(NETWORK)
    (root / "dopfast.toml").write_text(SETTINGS)


def contents(root: Path, *, without: Path = Path()) -> dict[str, str]:
    """Return what every file below `root` holds, by its path."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink() and path != root / without
    }
