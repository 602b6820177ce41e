"""Networks: their masks, and their training."""

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, masks, models, pruning, reach, runs, training
from dop_fast.config import PruneConfig, TrainConfig, fingerprint
from dop_fast.errors import ConfigError, StoreError
from dop_fast.masks import MaskSet
from dop_fast.patches import material
from dop_fast.pipeline.discovery import open_patches
from dop_fast.pipeline.opening import Track, open_data, untracked
from dop_fast.stores import PatchStore
from dop_fast.types import Batches
from dop_fast.workspace import Workspace

LATER = ("chunk", "notes")
"""What is known of a mask only when it is made."""
NEEDED = ("criterion", "material", "sparsity", "seed")
"""What a mask must say to be trained with."""
Training: TypeAlias = Generator[training.Epoch, None, dict[str, float]]
"""Yields every epoch, and returns the run's top1, top5 and loss."""


def prune(
    workspace: Workspace,
    config: PruneConfig,
    seed: int,
    device: torch.device,
    *,
    name: str = "",
    force: bool = False,
    track: Track = untracked,
) -> tuple[Path, MaskSet, nn.Module]:
    """Score the freshly initialised model and keep exactly the top share, as a mask.

    Criteria of several rounds go on after the last one that is done.
    """
    criterion = criteria.load(config.criterion, config.variant)
    if config.count != "exact" and config.variant != "published":
        raise ConfigError("only published code has a published count", "add --variant published")
    train, _ = open_data(workspace)
    kind = _material(workspace, config) if criterion.NEEDS_DATA else "none"
    path = workspace.mask(name or _label(config, kind, seed))
    model = models.build(workspace.model.name, len(train.classes), seed, workspace.root)
    like = open_mask(workspace, config.like)[1] if config.like else None
    if like:
        config = replace(config, sparsity=like.sparsity, definition="prunable")
    plan = pruning.Plan(
        pruning.density(model, config.sparsity, config.definition),
        pruning.rounds_of(criterion, config.rounds),
        published=config.count == "published",
        floor=config.min_layer_density,
        protected=_protected(config, model, _image(workspace)),
    )
    about = {
        "criterion": config.criterion,
        "material": kind,
        "settings": config.to_dict(),
        "sparsity": config.sparsity,
        "rounds": plan.rounds,
        "seed": seed,
        "model": workspace.model.name,
        "classes": len(train.classes),
        "init": models.fingerprint(model),
        "data": train.fingerprint,
    }
    needs_store = kind not in ("none", *material.WITHOUT_STORE)
    store = open_patches(workspace, train) if needs_store else None
    if criterion.NEEDS_DATA:
        about["patches"] = _source(store, kind)
    if path.is_file() and not force:
        return path, _same(path, about), model
    _prepare(criterion, model.to(device))
    batches: Batches = ()
    if criterion.NEEDS_DATA:
        config = _chunked(workspace, config, model)
        batches = material.gather(
            kind, store, train, workspace.data, config, seed=seed, device=device
        )
        about["notes"] = list(batches.notes)
    about["chunk"] = config.batch_size
    knobs = {
        "precision": config.precision,
        "variant": config.variant,
        "image": _image(workspace),
        "sparsity": 1 - plan.density,
        "like": like and like.masks,
    }
    job = pruning.Job(criterion, model, batches, cross_entropy, seed, knobs)
    rounds = track(pruning.rounds(job, plan, path, about), "pruning", plan.rounds)
    kept = replace(deque(rounds, maxlen=1).pop(), about=about)
    masks.save(path, kept)
    pruning.forget(path)
    return path, kept, model.cpu()


def _prepare(criterion: criteria.Criterion, model: nn.Module) -> None:
    """Change the network as the criterion asks for, in training too."""
    change = getattr(criterion, "prepare", None)
    if change is not None:
        change(model)


def _protected(
    config: PruneConfig, model: nn.Module, image: tuple[int, int, int]
) -> tuple[str, ...] | None:
    if not config.min_layer_density or config.protect == "all":
        return None
    return tuple(reach.sensitive(model, image))


def _same(path: Path, about: Mapping[str, Any]) -> MaskSet:
    """Return the mask that is there; StoreError where it was made from something else."""
    kept = masks.load(path)
    if {key: value for key, value in kept.about.items() if key not in LATER} != about:
        raise StoreError(
            f"{path} exists and was made with other settings",
            "replace it: dopfast prune --force ..., or give another --name",
        )
    return kept


def _label(config: PruneConfig, kind: str, seed: int) -> str:
    """Return a mask's name: what tells it from others, and of the rest what is not the default."""
    parts = [config.criterion]
    parts += [config.variant] if config.variant != "clean" else []
    parts += [config.count] if config.count != "exact" else []
    parts += [f"{config.rounds}r"] if config.rounds else []
    parts += [kind] if kind != "none" else []
    parts += [f"{config.sparsity:g}" + ("all" if config.definition == "all" else ""), f"s{seed}"]
    return "-".join(parts)


def _image(workspace: Workspace) -> tuple[int, int, int]:
    return 3, workspace.data.size, workspace.data.size


def _chunked(workspace: Workspace, config: PruneConfig, model: nn.Module) -> PruneConfig:
    """Return the settings with a chunk's size; 0 becomes what memory holds."""
    if config.batch_size:
        return config
    precision: Any = config.precision
    fit = engine.samples_that_fit(model, _image(workspace), cross_entropy, precision)
    return replace(config, batch_size=fit)


def _material(workspace: Workspace, config: PruneConfig) -> str:
    if config.material != "auto":
        return config.material
    return "stitched" if PatchStore(workspace.patches).stitching else "patches"


def _source(store: PatchStore | None, kind: str) -> str:
    if store is None:
        return ""
    return fingerprint(vars(store.header), store.stitching if kind.startswith("stitched") else None)


def open_mask(workspace: Workspace, name: str) -> tuple[str, MaskSet]:
    """Return a mask by name, or the newest one where the name is empty."""
    if name:
        return name, masks.load(workspace.mask(name))
    found = sorted(workspace.masks.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise StoreError("there is no mask yet", "run: dopfast prune --criterion grasp")
    return found[-1].stem, masks.load(found[-1])


def run_folder(workspace: Workspace, mask: str, name: str, seed: int) -> Path:
    """Return where a fine-tuning goes: by name, else by its mask, else as the dense baseline."""
    return workspace.run(name or mask or f"dense-s{seed}")


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
    if kept and (lacking := [key for key in NEEDED if key not in kept.about]):
        raise StoreError(
            f"the mask {name} does not say its {', '.join(lacking)}", "make one: dopfast prune"
        )
    seed = kept.about["seed"] if kept else seed
    data = training.TrainData(*open_data(workspace), workspace.data)
    model = models.build(workspace.model.name, len(data.train.classes), seed, workspace.root)
    if kept and kept.about.get("init") != models.fingerprint(model):
        raise StoreError(
            f"the mask {name} was made for other initial weights: {kept.about.get('model')} "
            f"of {kept.about.get('classes')} classes, seed {kept.about.get('seed')}",
            "make one for this workspace: dopfast prune --force",
        )
    if kept:
        _prepare(criteria.load(kept.about["criterion"]), model)
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
