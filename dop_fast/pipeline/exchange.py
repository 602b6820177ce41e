"""Networks and masks of a workspace, to other programs and from them."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dop_fast import disk, interop, masks, models, runs
from dop_fast.errors import StoreError, nearest
from dop_fast.interop import Exported
from dop_fast.masks import MaskSet
from dop_fast.pipeline.networks import IMPORTED, open_mask, prepare_as
from dop_fast.pipeline.opening import alone, open_data
from dop_fast.workspace import EXPORTS, Workspace


def export(
    workspace: Workspace, kind: str, run: str, mask: str, output: Path | None, *, force: bool
) -> tuple[str, Exported]:
    """Write a network as a file of `kind`, see `interop`; return its name and what was written.

    It is that of a run, or what a mask found before training; with neither name that of the run
    that was finished last, or else of the newest mask. Of a dense run everything is kept.
    StoreError where there is another file already, unless `force` replaces it.
    """
    name, model, kept = _open(workspace, run, mask)
    path = output or workspace.exports / f"{name}-{kind}.{EXPORTS[kind]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = workspace.data.size
    with disk.replacing(path, sum(value.nbytes for value in model.parameters())) as partial:
        made = interop.export(partial, model, kept, kind, (3, size, size))
        if not force:
            disk.refuse_other(path, partial)
    return name, replace(made, path=path)


def _open(workspace: Workspace, run: str, mask: str) -> tuple[str, nn.Module, MaskSet]:
    train, _ = open_data(workspace)
    classes = len(train.classes)
    run = run or ("" if mask else _last_run(workspace))
    if run:
        return run, *_trained(workspace, classes, run)
    name, kept = open_mask(workspace, mask)
    model = models.build(workspace.model.name, classes, kept.about["seed"], workspace.root)
    prepare_as(kept, model)
    return name, model, kept


def _last_run(workspace: Workspace) -> str:
    done = [run for run in runs.finished_runs(workspace.runs) if run.about.kind == "finetune"]
    return max(done, key=lambda run: str(run.finished)).name if done else ""


def _trained(workspace: Workspace, classes: int, name: str) -> tuple[nn.Module, MaskSet]:
    folder = workspace.run(name)
    if not folder.is_dir():
        known = [run.name for run in runs.finished_runs(workspace.runs)]
        raise StoreError(
            f"there is no run {name} in {workspace.runs}",
            nearest(name, known) or "make one: dopfast finetune",
        )
    found = runs.read(folder)
    if not found.finished:
        raise StoreError(f"the run {name} is not finished", "run the same dopfast finetune again")
    facts = found.about.facts
    model = models.build(facts["model"], classes, 0, workspace.root)
    models.load_weights(found.folder / runs.WEIGHTS, model, facts["model"])
    weights = models.prunable(model)
    if not facts.get("mask"):
        everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        return model, MaskSet(everything, {"model": facts["model"]})
    _, kept = open_mask(workspace, facts["mask"])
    masks.check_fit(model, kept)
    if any(bool(weights[name][~mask].any()) for name, mask in kept.masks.items()):
        raise StoreError(
            f"the mask {facts['mask']} is not the one that {name} was trained with any more",
            "make that mask again, or train again: dopfast finetune --force",
        )
    prepare_as(kept, model)
    return model, kept


def import_mask(
    workspace: Workspace, file: Path, name: str, seed: int, *, force: bool = False
) -> tuple[Path, MaskSet, nn.Module]:
    """Read the mask of the workspace's model from a file of any kind of `interop`, and keep it.

    One that dopfast did not make is trained from the weights that `seed` draws. StoreError where
    there is another mask of that name already, unless `force` replaces it.
    """
    path = workspace.mask(name or file.stem)
    train, _ = open_data(workspace)
    model = models.build(workspace.model.name, len(train.classes), seed, workspace.root)
    kept = interop.read(file, model)
    about = (
        kept.about
        if "init" in kept.about
        else {
            "criterion": IMPORTED,
            "material": "none",
            "file": file.name,
            "sparsity": kept.sparsity,
            "seed": seed,
            "model": workspace.model.name,
            "classes": len(train.classes),
            "init": models.fingerprint(model),
        }
    )
    kept = MaskSet(kept.masks, about)
    with alone(workspace, f"mask-{path.stem}", path):
        if path.exists() and not force and not _equal(masks.load(path), kept):
            raise StoreError(
                f"there is another mask {path.stem} already",
                "replace it: --force, or give a --name",
            )
        masks.save(path, kept)
    return path, kept, model


def _equal(one: MaskSet, other: MaskSet) -> bool:
    marks = {models.fingerprint(found.masks) for found in (one, other)}
    return len(marks) == 1 and one.about == other.about
