"""Algorithm 1 as five calls on a workspace: train, extract, stitch, prune, finetune."""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import nn

from dop_fast import criteria, images, masks, models, runs, stores, training
from dop_fast.concepts import FEWEST_IMAGES, Extractor
from dop_fast.config import (
    SMALL_SIDE,
    DataConfig,
    ExtractConfig,
    ModelConfig,
    PruneConfig,
    StitchConfig,
    TeacherConfig,
    TrainConfig,
    fingerprint,
)
from dop_fast.errors import ConfigError, StoreError
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.patches import material, stitching
from dop_fast.stores import Header, PatchStore, PatchWriter
from dop_fast.workspace import TOML, Workspace
from dop_fast.workspace import create as write

T = TypeVar("T")
RANDOM = "random.zarr"
Training: TypeAlias = Generator[training.Epoch, None, dict[str, float]]
"""Yields every epoch, and returns the run's top1, top5 and loss."""


class Track(Protocol):
    """Passes items on and may show how far it is."""

    def __call__(self, items: Iterable[T], label: str, total: int) -> Iterable[T]:
        """Yield every item."""
        ...


def untracked(items: Iterable[T], label: str, total: int) -> Iterable[T]:
    """Pass items on and show nothing."""
    return items


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
    if (root / TOML).exists() and not force:
        raise StoreError(f"{root} is a workspace already", "make it anew: dopfast init --force ...")
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
    write(made)
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


def extract(
    workspace: Workspace,
    config: ExtractConfig,
    seed: int,
    device: torch.device,
    *,
    force: bool = False,
    track: Track = untracked,
) -> PatchStore:
    """Find every class's concepts (ACE) and store them; an interrupted run goes on.

    Activations of the random sets stay in `RANDOM` for runs with the same teacher and images.
    """
    train, _ = open_data(workspace)
    given = teacher_config(workspace)
    teacher = models.load_teacher(given, len(train.classes), workspace.root)
    extractor = Extractor(
        teacher, given.layer, train, workspace.data, config, seed, device, workspace.root / RANDOM
    )
    header = Header(
        classes=train.classes,
        canvas=(train.size, train.size),
        fill=config.fill,
        data=train.fingerprint,
        teacher=models.fingerprint(teacher),
        layer=extractor.layer,
        config={**config.to_dict(), "seed": seed},
    )
    if stores.exists(workspace.patches) and not force:
        store = PatchStore(workspace.patches)
        if store.header == header:
            return store
        raise StoreError(
            f"{workspace.patches} was extracted with other data, teacher or settings",
            "replace it: dopfast extract --force",
        )
    writer = PatchWriter(workspace.patches, header)
    for class_id in track(range(len(train.classes)), "extracting", len(train.classes)):
        if not writer.done(class_id):
            writer.write(extractor.extract(class_id), train.load)
    return writer.finish()


def open_patches(workspace: Workspace, train: ImageSet) -> PatchStore:
    """Open the workspace's store; StoreError where it is of other data or another teacher."""
    store = PatchStore(workspace.patches)
    again = "dopfast extract --force"
    if store.header.data != train.fingerprint:
        raise StoreError(f"{workspace.patches} was extracted from other images", again)
    teacher = models.load_teacher(teacher_config(workspace), len(train.classes), workspace.root)
    if store.header.teacher != models.fingerprint(teacher):
        raise StoreError(f"{workspace.patches} was extracted with another teacher", again)
    return store


@dataclass(frozen=True)
class Stitched:
    """How Super Stitching went: coverage r by class, and how many patches stayed below sigma.

    `visible`: the mean share of a patch that shows each concept, the most important one first.
    """

    store: PatchStore
    coverage: dict[str, float]
    short: dict[str, int]
    visible: list[float]


def stitch(
    workspace: Workspace,
    config: StitchConfig,
    seed: int,
    *,
    force: bool = False,
    track: Track = untracked,
) -> Stitched:
    """Stitch every class's concepts (Algorithm 2) into the store."""
    train, _ = open_data(workspace)
    store = open_patches(workspace, train)
    about = {**config.to_dict(), "seed": seed}
    found = store.stitching
    if found is not None and found != about and not force:
        raise StoreError(
            f"{store.path} already has stitched patches, made with other settings",
            "replace them: dopfast stitch --force",
        )
    names = store.header.classes
    if found is None or force:
        parts = stitching.stitch_all(store, train, config, seed)
        store.write_stitched(
            track(parts, "stitching", len(names)), len(names) * config.per_class, about
        )
    return _stitched(store, config)


def _stitched(store: PatchStore, config: StitchConfig) -> Stitched:
    coverage = store.coverage().reshape(-1, config.per_class)  # class by class
    names = store.header.classes
    short = (coverage < config.sigma).sum(axis=1)
    return Stitched(
        store,
        dict(zip(names, coverage.mean(axis=1).tolist(), strict=True)),
        {name: int(count) for name, count in zip(names, short, strict=True) if count},
        store.visible().tolist(),
    )


def prune(
    workspace: Workspace,
    config: PruneConfig,
    seed: int,
    device: torch.device,
    *,
    name: str = "",
    force: bool = False,
) -> tuple[Path, MaskSet, nn.Module]:
    """Score the freshly initialised model once and keep exactly the top share, as a mask."""
    criterion = criteria.load(config.criterion)
    train, _ = open_data(workspace)
    classes = len(train.classes)
    kind = _material(workspace, config) if criterion.NEEDS_DATA else "none"
    label = f"{config.criterion}-" + (f"{kind}-" if criterion.NEEDS_DATA else "")
    path = workspace.masks / f"{name or f'{label}{config.sparsity:g}-s{seed}'}.safetensors"
    model = models.build(workspace.model.name, classes, seed, workspace.root)
    about = {
        "criterion": config.criterion,
        "material": kind,
        "settings": config.to_dict(),
        "sparsity": config.sparsity,
        "seed": seed,
        "model": workspace.model.name,
        "classes": classes,
        "init": models.fingerprint(model),
        "data": train.fingerprint,
    }
    batches: Iterable[Any] = ()
    if criterion.NEEDS_DATA:
        store = None if kind in ("images", "ones") else open_patches(workspace, train)
        about["patches"] = _source(store, kind)
        batches = material.gather(
            kind, store, train, workspace.data, config, seed=seed, device=device
        )
    if path.is_file() and not force:
        kept = masks.load(path)
        if kept.about == about:
            return path, kept, model
        raise StoreError(
            f"{path} exists and was made with other settings",
            "replace it: dopfast prune --force ..., or give another --name",
        )
    knobs = {"precision": config.precision} if criterion.NEEDS_DATA else {}
    scores = criterion.score(model.to(device), batches, nn.functional.cross_entropy, seed, **knobs)
    kept = replace(masks.keep_top(scores, config.sparsity), about=about)
    masks.save(path, kept)
    return path, kept, model.cpu()


def _material(workspace: Workspace, config: PruneConfig) -> str:
    if config.material != "auto":
        return config.material
    return "stitched" if PatchStore(workspace.patches).stitching else "patches"


def _source(store: PatchStore | None, kind: str) -> str:
    if store is None:
        return ""
    return fingerprint(vars(store.header), store.stitching if kind == "stitched" else None)


def open_mask(workspace: Workspace, name: str) -> tuple[str, MaskSet]:
    """Return a mask by name, or the newest one where the name is empty."""
    if name:
        return name, masks.load(workspace.masks / f"{name}.safetensors")
    found = sorted(workspace.masks.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StoreError("there is no mask yet", "run: dopfast prune --criterion grasp")
    return found[-1].stem, masks.load(found[-1])


def run_folder(workspace: Workspace, mask: str, name: str, seed: int) -> Path:
    """Return where a fine-tuning goes: by name, else by its mask, else as the dense baseline."""
    return workspace.runs / (name or mask or f"dense-s{seed}")


def finetune(
    workspace: Workspace,
    config: TrainConfig,
    mask: tuple[str, MaskSet] | None,
    folder: Path,
    seed: int,
    device: torch.device,
    *,
    force: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Training:
    """Train the pruned model, its mask held at every step; without a mask, the dense one.

    The weights start as those that were scored: the mask's seed draws them again.
    """
    name, kept = mask or ("", None)
    seed = kept.about["seed"] if kept else seed
    data = training.TrainData(*open_data(workspace), workspace.data)
    model = models.build(workspace.model.name, len(data.train.classes), seed, workspace.root)
    if kept and kept.about.get("init") != models.fingerprint(model):
        raise StoreError(
            f"the mask {name} was made for other initial weights: {kept.about.get('model')} "
            f"of {kept.about.get('classes')} classes, seed {kept.about.get('seed')}",
            "make one for this workspace: dopfast prune --force",
        )
    facts = {
        "model": workspace.model.name,
        "mask": name,
        "criterion": kept.about["criterion"] if kept else None,
        "material": kept.about["material"] if kept else None,
        "sparsity": kept.about["sparsity"] if kept else 0.0,
        "seed": seed,
        "data": data.train.fingerprint,
    }
    about = runs.About("finetune", facts, config.to_dict(), sources or {}, str(device))
    result = yield from _follow(model, data, config, folder, about, kept, force=force)
    return result


def train(
    workspace: Workspace,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    *,
    force: bool = False,
    sources: Mapping[str, str] | None = None,
) -> Training:
    """Train the dense teacher; its weights become the workspace's teacher.safetensors."""
    if workspace.teacher.weights:
        raise ConfigError(
            f"the teacher has weights already: {workspace.teacher.weights}",
            "go on: dopfast extract, or empty [teacher] weights in dopfast.toml",
        )
    data = training.TrainData(*open_data(workspace), workspace.data)
    name = workspace.teacher.name
    model = models.build(name, len(data.train.classes), seed, workspace.root)
    facts = {"model": name, "seed": seed, "data": data.train.fingerprint}
    about = runs.About("train", facts, config.to_dict(), sources or {}, str(device))
    folder = workspace.runs / "teacher"
    result = yield from _follow(model, data, config, folder, about, None, force=force)
    models.save_weights(workspace.teacher_weights, model, {"model": name})
    return result


def _follow(
    model: nn.Module,
    data: training.TrainData,
    config: TrainConfig,
    folder: Path,
    about: runs.About,
    kept: MaskSet | None,
    *,
    force: bool,
) -> Training:
    runs.begin(folder, about, force)
    last = None
    for last in training.fit(
        model, data, config, folder, masks=kept, seed=about.facts["seed"],
        device=torch.device(about.device), about={"model": about.facts["model"]},
    ):  # fmt: skip
        yield last
    assert last is not None  # a training has one epoch or more
    result = {"top1": last.top1, "top5": last.top5, "loss": last.val_loss}
    runs.finish(folder, result)
    return result


def concept_table(store: PatchStore, alpha: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each class, and the classes without one significant concept."""
    rows, weak = [], []
    for class_id, name in enumerate(store.header.classes):
        found = store.concepts(class_id)
        best = found.concepts[0] if found.concepts else None
        rows.append(
            {
                "class": name,
                "segments": len(found.segments),
                "concepts": len(found.concepts),
                "tcav": f"{best.tcav:.3f}" if best else "-",
                "p": f"{best.p_value:.2g}" if best else "-",
            }
        )
        if not any(concept.significant(alpha) for concept in found.concepts):
            weak.append(name)
    return rows, weak
