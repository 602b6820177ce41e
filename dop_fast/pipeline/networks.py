"""Networks: their masks, and their training."""

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, masks, models, pruning, ranks, reach, runs, training
from dop_fast.config import PruneConfig, TrainConfig
from dop_fast.errors import ConfigError, ModelError, StoreError, nearest
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.patches import material
from dop_fast.pipeline.discovery import open_patches
from dop_fast.pipeline.opening import alone, open_data
from dop_fast.settings import fingerprint
from dop_fast.stores import PatchStore
from dop_fast.types import Batches, Track, untracked
from dop_fast.workspace import Workspace

LIKENED = "same-densities"
"""The one criterion that takes the densities of another mask."""
IMPORTED = "imported"
"""The criterion of a mask that another program made."""
LATER = ("chunk", "notes", "parameters", "on_path", "paths")
"""What is known of a mask only when it is made."""
NEEDED = ("criterion", "material", "sparsity", "seed")
"""What a mask must say to be trained with."""
Training: TypeAlias = Generator[training.Epoch, None, dict[str, Any]]
"""Yields every epoch, and returns the result that the run's manifest tells."""


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
    task = _open_task(workspace, config, seed)
    path = workspace.mask(name or task.label)
    plan, about = task.plan, task.about()
    with alone(workspace, f"mask-{path.stem}", path):
        if not force and ranks.once(path.is_file):
            kept = _same(path, about)
            ranks.once(partial(pruning.forget, path))  # by who was killed before
            return path, kept, task.model
        _prepare(task.criterion, task.model.to(device))
        batches, made = task.batches(device)
        about |= made
        knobs = {
            "precision": config.precision,
            "variant": config.variant,
            "image": _image(workspace),
            "sparsity": 1 - plan.density,
            "like": task.like and task.like.masks,
        }
        job = pruning.Job(task.criterion, task.model, batches, cross_entropy, seed, knobs)
        kept = deque(pruning.rounds(job, plan, path, about, track), maxlen=1).pop()
        about["parameters"] = sum(value.numel() for value in task.model.parameters())
        about |= _paths(task.model, kept, _image(workspace))
        kept = replace(kept, about=about)
        ranks.once(partial(masks.save, path, kept))
        ranks.once(partial(pruning.forget, path))
        return path, kept, task.model.cpu()


@dataclass(frozen=True)
class _Task:
    """One pruning, checked and not begun; made by `_open_task`.

    `kind` is the material, "none" where the criterion needs no data; `store` that of its patches.
    """

    workspace: Workspace
    config: PruneConfig
    seed: int
    criterion: criteria.Criterion
    plan: pruning.Plan
    train: ImageSet
    model: nn.Module
    like: MaskSet | None
    kind: str
    store: PatchStore | None

    @property
    def label(self) -> str:
        """The mask's name: what tells it from others, and of the rest what is not the default."""
        config = self.config
        parts = [config.criterion]
        parts += [config.variant] if config.variant != "clean" else []
        parts += [config.count] if config.count != "exact" else []
        parts += [f"{config.rounds}r"] if config.rounds else []
        parts += [f"floor{config.min_layer_density:g}"] if config.min_layer_density else []
        parts += [self.kind] if self.kind != "none" else []
        if self.like:
            return "-".join([*parts, config.like, f"s{self.seed}"])
        of = "all" if config.definition == "all" else ""
        share = f"{config.sparsity:g}{of}" if config.pattern == "none" else "2of4"
        return "-".join([*parts, share, f"s{self.seed}"])

    def about(self) -> dict[str, Any]:
        """Return what the mask is made from, as its file says; `LATER` comes when it is made."""
        source = {"patches": _source(self.store, self.kind)} if self.criterion.NEEDS_DATA else {}
        asked = self.like.about if self.like else {}
        if self.like:  # trained as what it is compared with
            source["prepared"] = _preparing(self.like)
        return {
            "criterion": self.config.criterion,
            "material": self.kind,
            "settings": self.config.to_dict(),
            "sparsity": asked.get("sparsity", self.config.sparsity),
            "rounds": self.plan.rounds,
            "seed": self.seed,
            "model": self.workspace.model.name,
            "classes": len(self.train.classes),
            "init": models.fingerprint(self.model),
            "data": self.train.fingerprint,
            **source,
        }

    def batches(self, device: torch.device) -> tuple[Batches, dict[str, Any]]:
        """Return what the model, which is on the device, is scored on, and what is known of it."""
        if not self.criterion.NEEDS_DATA:
            return (), {"chunk": self.config.batch_size}
        config = _chunked(self.workspace, self.config, self.model)
        found = material.gather(
            self.kind, self.store, self.train, self.workspace.data, config,
            seed=self.seed, device=device,
        )  # fmt: skip
        return found, {"notes": list(found.notes), "chunk": config.batch_size}


def _open_task(workspace: Workspace, config: PruneConfig, seed: int) -> _Task:
    """Check what is asked, and open what it needs."""
    criterion = criteria.load(config.criterion, config.variant)
    train, _ = open_data(workspace)
    model = models.build(workspace.model.name, len(train.classes), seed, workspace.root)
    like = _like(workspace, config, model)
    if like:
        config = replace(config, sparsity=like.sparsity, definition="prunable")
    plan = pruning.plan(config, model, _image(workspace))
    if plan.fours:
        config = replace(config, sparsity=1 - plan.density)
    kind = _material(workspace, config) if criterion.NEEDS_DATA else "none"
    needs_store = kind not in ("none", *material.WITHOUT_STORE)
    store = open_patches(workspace, train) if needs_store else None
    return _Task(workspace, config, seed, criterion, plan, train, model, like, kind, store)


def _like(workspace: Workspace, config: PruneConfig, model: nn.Module) -> MaskSet | None:
    """Return the mask whose densities are asked for, if one is."""
    if not config.like:
        return None
    if config.criterion != LIKENED:
        raise ConfigError(
            f"{config.criterion} takes no densities of another mask",
            f"leave --like out, or: --criterion {LIKENED}",
        )
    like = open_mask(workspace, config.like)[1]
    masks.check_fit(model, like)
    return like


def prepare_as(mask: MaskSet, model: nn.Module) -> None:
    """Change the network as that of the mask was, in training too; an imported one's was not."""
    criterion = _preparing(mask)
    if criterion != IMPORTED:
        _prepare(criteria.load(criterion), model)


def _preparing(mask: MaskSet) -> str:
    """Return the criterion that a mask's network was prepared for, if it says one."""
    return str(mask.about.get("prepared") or mask.about.get("criterion", LIKENED))


def _prepare(criterion: criteria.Criterion, model: nn.Module) -> None:
    """Change the network as the criterion asks for, in training too."""
    change = getattr(criterion, "prepare", None)
    if change is not None:
        change(model)


def _paths(model: nn.Module, kept: MaskSet, image: tuple[int, int, int]) -> dict[str, Any]:
    """Return how many kept weights of each layer lie on a path, and what else `reach` tells."""
    try:
        found = reach.follow(model, kept, image)
    except ModelError as error:  # the mask is made: it is only not known what it leaves
        return {"on_path": {}, "paths": {"unknown": error.message}}
    return {
        "on_path": {row.name: row.kept for row in found.alive.layers()},
        "paths": {
            "outputs": found.outputs,
            "reached": found.reached,
            "cut": list(found.cut),
            "guessed": list(found.guessed),
        },
    }


def _same(path: Path, about: Mapping[str, Any]) -> MaskSet:
    """Return the mask that is there; StoreError where it was made from something else."""
    kept = masks.load(path)
    there = {key: value for key, value in kept.about.items() if key not in LATER}
    # settings that came later were at their defaults
    there["settings"] = {**PruneConfig().to_dict(), **there.get("settings", {})}
    if there != about:
        raise StoreError(
            f"{path} exists and was made with other settings",
            "replace it: dopfast prune --force ..., or give another --name",
        )
    return kept


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
        path = workspace.mask(name)
        if not path.is_file():
            known = [mask.stem for mask in workspace.masks.glob("*.safetensors")]
            raise StoreError(
                f"there is no mask {name} in {workspace.masks}",
                nearest(name, known) or "make one: dopfast prune --criterion grasp",
            )
        return name, masks.load(path)
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
    track: Track = untracked,
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
    if kept:
        _check_mask(name, kept, model)
        prepare_as(kept, model)
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
    with alone(workspace, f"run-{folder.name}", folder):
        result = yield from _follow(
            model, data, config, folder, about, kept, force=force, track=track
        )
    return result


def _check_mask(name: str, kept: MaskSet, model: nn.Module) -> None:
    masks.check_fit(model, kept)
    mine, theirs = models.fingerprint(model), kept.about.get("init")
    if mine != theirs:
        raise StoreError(
            f"the mask {name} was made for other initial weights: {kept.about.get('model')} "
            f"of {kept.about.get('classes')} classes, seed {kept.about.get('seed')}, "
            f"fingerprint {theirs} instead of {mine}",
            "make one for this workspace: dopfast prune --force",
        )


def train(
    workspace: Workspace,
    config: TrainConfig,
    seed: int,
    device: torch.device,
    *,
    force: bool = False,
    sources: Mapping[str, str] | None = None,
    track: Track = untracked,
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
    folder = workspace.teacher_run
    with alone(workspace, f"run-{folder.name}", folder):
        result = yield from _follow(
            model, data, config, folder, about, None, force=force, track=track
        )
        ranks.once(partial(models.save_weights, workspace.teacher_weights, model, {"model": name}))
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
    track: Track,
) -> Training:
    ranks.once(partial(runs.begin, folder, about, force))
    fitted = yield from training.fit(
        model, data, config, folder, masks=kept, seed=about.facts["seed"], track=track,
        device=torch.device(about.device), about={"model": about.facts["model"]},
    )  # fmt: skip
    last, best = fitted.epochs[-1], max(fitted.epochs, key=lambda epoch: epoch.best_top1)
    result = {
        "top1": last.top1,
        "top5": last.top5,
        "loss": last.val_loss,
        **({} if last.ema_top1 is None else {"ema_top1": last.ema_top1}),
        "best_top1": best.best_top1,
        "best_epoch": best.epoch,
        "unreadable": list(fitted.unreadable),
    }
    ranks.once(partial(runs.finish, folder, result))
    return result
