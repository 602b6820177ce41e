"""A workspace, its images, its teacher and the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dop_fast import images, models, ranks
from dop_fast.claims import Claims
from dop_fast.concepts import FEWEST_IMAGES
from dop_fast.config import SMALL_SIDE, DataConfig, ModelConfig, TeacherConfig
from dop_fast.errors import ConfigError, StoreError
from dop_fast.images import ImageSet
from dop_fast.settings import fingerprint
from dop_fast.workspace import Workspace
from dop_fast.workspace import create as write


@contextmanager
def alone(workspace: Workspace, key: str, what: Path | str) -> Iterator[None]:
    """Work on something in this process only; StoreError says which other process has it."""
    if not ranks.here().first:  # the first one has it for all of them
        yield
        return
    claims = Claims(workspace.claims)
    claim = claims.take(key)
    if claim is None:
        raise StoreError(
            f"{what} is being worked on by {claims.holder(key) or 'another process'}",
            "wait until it is done, or end that process; then run the same command again",
        )
    with claim:
        yield


def store_key(workspace: Workspace) -> str:
    """Return what the workspace's store of patches is claimed by."""
    return f"store-{fingerprint(workspace.store)}"


def device_of(name: str) -> torch.device:
    """Return the device by name; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {name!r} here", "try --device auto") from error
    return device


def init(
    root: Path, *, data: str, size: int, teacher: str, model: str, seed: int, force: bool
) -> tuple[Workspace, ImageSet, ImageSet]:
    """Make a workspace at `root` for the images at `data`, seen from the current folder.

    A `size` of 0 is the first image's up to 64 pixels, else 224; without a teacher's name it is
    resnet20 up to 64 pixels, else resnet18; without a model's name it is the teacher's.
    """
    path = str(Path(data).expanduser().resolve()) if Path(data).expanduser().exists() else data
    config = DataConfig(path=path, size=size or DataConfig().size)
    train, val = images.open_images(config, root, seed)
    if not size:
        short = min(train.decode(0).size)
        config = replace(config, size=short if short <= SMALL_SIDE else config.size)
        train, val = replace(train, size=config.size), replace(val, size=config.size)
    chosen = models.parse_teacher(
        teacher or ("resnet20" if config.size <= SMALL_SIDE else "resnet18")
    )
    made = Workspace(root, seed, config, chosen, ModelConfig(model or chosen.name), {})
    models.build(made.model.name, len(train.classes), seed, root)
    if chosen.weights:
        models.load_teacher(chosen, len(train.classes), root)
    write(made, force=force)
    return made, train, val


def small_classes(train: ImageSet) -> dict[str, int]:
    """Return the classes that are too small to extract concepts from, and their image counts."""
    counts = {name: len(train.of_class(i)) for i, name in enumerate(train.classes)}
    return {name: count for name, count in counts.items() if count < FEWEST_IMAGES}


def open_data(workspace: Workspace) -> tuple[ImageSet, ImageSet]:
    """Return the workspace's training and validation images."""
    return images.open_images(workspace.data, workspace.root, workspace.seed)


def teacher_config(workspace: Workspace) -> TeacherConfig:
    """Return the teacher's settings; one trained by `train` is found by itself."""
    config = workspace.teacher
    if not config.weights and workspace.teacher_weights.is_file():
        return replace(config, weights=workspace.teacher_weights.name)
    return config
