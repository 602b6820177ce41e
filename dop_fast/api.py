"""What `import dop_fast` gives, each name loaded when it is asked for; docs/api.md shows each.

Settings of a stage are those of its command, by name, and stand over those of dopfast.toml.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

from torch import nn
from torch.nn.functional import cross_entropy

from dop_fast import options, pipeline, pruning, workspace
from dop_fast.config import ExtractConfig, PruneConfig, StitchConfig, TrainConfig
from dop_fast.interop import export
from dop_fast.interop import read as read_mask
from dop_fast.masks import MaskSet
from dop_fast.masks import apply_ as apply_mask
from dop_fast.masks import load as load_mask
from dop_fast.masks import save as save_mask
from dop_fast.pipeline import Stitched, Training
from dop_fast.settings import StageConfig
from dop_fast.stores import PatchStore
from dop_fast.training import Epoch, hold
from dop_fast.types import Batches, Loss
from dop_fast.workspace import Workspace

__all__ = [
    "MaskSet", "apply_mask", "export", "extract", "finetune", "hold", "init", "load_mask", "prune",
    "read_mask", "save_mask", "stitch", "train",
]  # fmt: skip

C = TypeVar("C", bound=StageConfig)
Each = Callable[[Epoch], object]


def init(
    folder: str | Path, data: str, *, size: int = 0, teacher: str = "", model: str = "",
    seed: int = 0, force: bool = False,
) -> Workspace:  # fmt: skip
    """Make a workspace for a folder of images, and return what its dopfast.toml says."""
    made, _, _ = pipeline.init(
        Path(folder), data=data, size=size, teacher=teacher, model=model, seed=seed, force=force
    )
    return made


def train(
    folder: str | Path, *, seed: int | None = None, device: str = "auto", force: bool = False,
    each: Each | None = None, **settings: Unpack[options.Training],
) -> Mapping[str, Any]:  # fmt: skip
    """Train the teacher of a workspace; return its accuracies. `each` is given every epoch."""
    space = workspace.load(Path(folder))
    steps = pipeline.train(
        space, _config(TrainConfig, space, "train", settings), _seed(space, seed),
        pipeline.device_of(device), force=force,
    )  # fmt: skip
    return _followed(steps, each)


def extract(
    folder: str | Path, *, seed: int | None = None, device: str = "auto", force: bool = False,
    **settings: Unpack[options.Extraction],
) -> PatchStore:  # fmt: skip
    """Find the concepts of every class of a workspace; goes on where it was interrupted."""
    space = workspace.load(Path(folder))
    config = _config(ExtractConfig, space, "extract", settings)
    return pipeline.extract(
        space, config, _seed(space, seed), pipeline.device_of(device), force=force
    )


def stitch(
    folder: str | Path,
    *,
    seed: int | None = None,
    force: bool = False,
    **settings: Unpack[options.Stitching],
) -> Stitched:
    """Stitch the concepts of a workspace into patches."""
    space = workspace.load(Path(folder))
    config = _config(StitchConfig, space, "stitch", settings)
    return pipeline.stitch(space, config, _seed(space, seed), force=force)


@overload
def prune(
    target: nn.Module, batches: Batches = (), *, seed: int | None = None,
    loss: Loss = cross_entropy, image: Sequence[int] = (), **settings: Unpack[options.Pruning],
) -> MaskSet: ...  # fmt: skip


@overload
def prune(
    target: str | Path, *, seed: int | None = None, device: str = "auto", name: str = "",
    force: bool = False, **settings: Unpack[options.Pruning],
) -> MaskSet: ...  # fmt: skip


def prune(
    target: nn.Module | str | Path, batches: Batches = (), *, seed: int | None = None,
    loss: Loss = cross_entropy, image: Sequence[int] = (), device: str = "auto", name: str = "",
    force: bool = False, **settings: Unpack[options.Pruning],
) -> MaskSet:  # fmt: skip
    """Return a mask of the best weights: of a network, scored on `batches`, or of a workspace's.

    A network is left as it was found, see `pruning.of_model`; a workspace's mask is stored there
    under `name`.
    """
    if isinstance(target, nn.Module):
        config = PruneConfig.from_dict(settings, "prune")
        return pruning.of_model(target, batches, config, seed=seed or 0, loss=loss, image=image)
    space = workspace.load(Path(target))
    _, kept, _ = pipeline.prune(
        space, _config(PruneConfig, space, "prune", settings), _seed(space, seed),
        pipeline.device_of(device), name=name, force=force,
    )  # fmt: skip
    return kept


def finetune(
    folder: str | Path, mask: str | None = "", *, name: str = "", seed: int | None = None,
    device: str = "auto", force: bool = False, each: Each | None = None,
    **settings: Unpack[options.Training],
) -> Mapping[str, Any]:  # fmt: skip
    """Train a workspace's network under a mask of it, and return what came out, as `train`.

    `mask`: its name; empty: the newest; None: no mask, the dense baseline.
    """
    space = workspace.load(Path(folder))
    chosen = None if mask is None else pipeline.open_mask(space, mask)
    seed = _seed(space, seed)
    steps = pipeline.finetune(
        space, _config(TrainConfig, space, "finetune", settings), chosen,
        pipeline.run_folder(space, chosen[0] if chosen else "", name, seed), seed,
        pipeline.device_of(device), force=force,
    )  # fmt: skip
    return _followed(steps, each)


def _config(kind: type[C], space: Workspace, stage: str, settings: Mapping[str, Any]) -> C:
    return kind.from_dict({**space.stages[stage], **settings}, stage)


def _seed(space: Workspace, seed: int | None) -> int:
    return space.seed if seed is None else seed


def _followed(steps: Training, each: Each | None) -> Mapping[str, Any]:
    while True:
        try:
            epoch = next(steps)
        except StopIteration as end:
            result: Mapping[str, Any] = end.value
            return result
        if each is not None:
            each(epoch)
