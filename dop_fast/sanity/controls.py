"""Controls of a mask: what it shares with masks that should be worse if it meant something.

Su et al. (2020) and Frankle et al. (2021): after shuffling a mask inside its layers, or drawing
other weights under it, networks train as well. Without training, overlaps tell how far a mask
follows from its items, its weights and its labels; with it, whether that matters.
"""

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dop_fast import criteria, masks, models, pipeline
from dop_fast.config import TrainConfig
from dop_fast.errors import StoreError
from dop_fast.masks import MaskSet
from dop_fast.patches.material import Material, gather
from dop_fast.sanity.agreement import overlap
from dop_fast.sanity.halves import redrawn
from dop_fast.sanity.study import Results, Study
from dop_fast.seeding import derive, stream
from dop_fast.training import Epoch
from dop_fast.types import Batch, Track, untracked

ORIGINAL, SHUFFLED, REDRAWN, RANDOM = "original", "shuffled", "re-initialised", "random"
PERMUTED = "permuted labels"
TRAINED = (ORIGINAL, SHUFFLED, REDRAWN, PERMUTED, RANDOM)


@dataclass(frozen=True)
class Control:
    """A mask that is scored anew: `weights` and `items` are added to the seed they follow from."""

    name: str
    weights: int = 0
    items: int = 0
    permuted: bool = False


SCORED = (
    Control(ORIGINAL),
    Control("other items", items=1),
    Control("other weights", weights=1),
    Control("other weights and items", weights=1, items=1),
    Control(PERMUTED, permuted=True),
)


def compare(study: Study, *, force: bool = False, track: Track = untracked) -> None:
    """Score the controls of every criterion and material, and write their overlaps.

    Masks are kept in the workspace, so that none is scored twice.
    """
    results = Results(study)
    ways = [(c, m) for c in dict.fromkeys(study.config.criterion) for m in study.materials]
    todo = [(*way, control) for way in ways for control in SCORED]
    for criterion, material, control in track(todo, _label, len(todo)):
        original = _mask(study, criterion, material, SCORED[0], force and control is SCORED[0])
        mask = _mask(study, criterion, material, control, force and control is not SCORED[0])
        _put(results, (criterion, material, control.name), original, mask)
        if control is SCORED[0]:
            for name, derived in _derived(study, original):
                _put(results, (criterion, material, name), original, derived)
    for criterion in dict.fromkeys(study.config.criterion):
        for pair in combinations(study.materials, 2):
            first, second = (_mask(study, criterion, kind, SCORED[0], False) for kind in pair)
            results.put("materials", "/".join((criterion, *pair)), asdict(overlap(first, second)))


def _label(way: tuple[str, str, Control]) -> str:
    criterion, material, control = way
    return f"scoring {criterion}/{material}/{control.name}"


def _put(results: Results, key: tuple[str, str, str], original: MaskSet, mask: MaskSet) -> None:
    name = "/".join(key)
    trained = results["controls"].get(name, {})
    row = {"of": original.about["items"], **asdict(overlap(original, mask))}
    if "top1" in trained and trained["of"] == row["of"]:
        row["top1"] = trained["top1"]
    results.put("controls", name, row)


def _derived(study: Study, original: MaskSet) -> Iterator[tuple[str, MaskSet]]:
    yield SHUFFLED, shuffled(original, study.seed)
    scores = criteria.load("random").score(study.model(study.seed), (), _no_loss, study.seed)
    yield RANDOM, masks.keep_top(scores, study.config.sparsity)


def _no_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError  # random scores look at no data


def shuffled(mask: MaskSet, seed: int) -> MaskSet:
    """Return a mask that keeps as many weights of each layer, but by lot."""
    made = {}
    for name, layer in mask.masks.items():
        order = stream(seed, "shuffle", name).permutation(layer.numel())
        made[name] = layer.flatten()[torch.from_numpy(order)].reshape(layer.shape)
    return replace(mask, masks=made)


def _mask(study: Study, criterion: str, material: str, control: Control, force: bool) -> MaskSet:
    """Return the mask of a control, from its file where it is there and of the same."""
    path = _file(study, f"{criterion}-{material}-{control.name.replace(' ', '-')}")
    seed = study.seed + control.weights
    about = {
        **study.about,
        "criterion": criterion,
        "material": material,
        "control": control.name,
        "per_class": study.config.per_class,
        "items": study.source(material),
        "seed": seed,
        "init": models.fingerprint(study.model(seed)),
    }
    if path.is_file() and not force:
        try:
            found = masks.load(path)
        except StoreError:  # damaged: made again
            found = MaskSet({})
        if found.about == about:
            return found
    scores = study.score(criterion, study.model(seed), _items(study, material, control))
    made = replace(masks.keep_top(scores, study.config.sparsity), about=about)
    masks.save(path, made)
    return made


def _items(study: Study, material: str, control: Control) -> Material:
    per_class, store = study.config.per_class, study.store
    seed = study.seed + control.items
    if store is not None and control.items:  # stored ones are the same whatever the seed
        store = redrawn(study.train, store, derive(seed, "stitched"), per_class)
    batches = gather(
        material, store, study.train, study.workspace.data, study.prune_config(per_class),
        seed=seed, device=study.device,
    )  # fmt: skip
    return permuted(batches, per_class, study.seed) if control.permuted else batches


def _file(study: Study, name: str) -> Path:
    return study.workspace.sanity / "masks" / f"{name}-{study.path.stem}.safetensors"


def permuted(material: Material, per_class: int, seed: int) -> Material:
    """Return the same items in the same chunks, with each other's labels."""
    count = sum(map(len, material.chunks))
    label = stream(seed, "permuted labels").permutation(count) // per_class

    def make(items: np.ndarray[Any, Any]) -> Batch:
        images, labels = material.make(items)
        return images, torch.from_numpy(label[items]).to(labels)

    return replace(material, make=make)


def train(
    study: Study, *, force: bool = False, track: Track = untracked
) -> Generator[str | Epoch, None, dict[str, dict[str, float]]]:
    """Train every control as `finetune` would, by dopfast.toml; return their results by run.

    The random mask is the same for all, and trained once.
    """
    config = TrainConfig.from_dict(study.workspace.stages["finetune"], "finetune")
    results, found = Results(study), {}
    for criterion in dict.fromkeys(study.config.criterion):
        for material in study.materials:
            for name in TRAINED:
                kept = _trained(study, criterion, material, name)
                lead = "random" if name == RANDOM else f"{criterion}-{material}-{name}"
                run = f"sanity-{lead.replace(' ', '-')}-{study.path.stem}"
                if run not in found:
                    yield f"train: {run}, {config.epochs} epochs"
                    found[run] = yield from pipeline.finetune(
                        study.workspace, config, (run, kept), study.workspace.runs / run,
                        study.seed, study.device, force=force, track=track,
                    )  # fmt: skip
                key = f"{criterion}/{material}/{name}"
                top1 = found[run]["top1"]
                original = _mask(study, criterion, material, SCORED[0], False)
                row = {"of": kept.about["items"], **asdict(overlap(original, kept))}
                results.put("controls", key, {**row, "top1": top1})
    return found


def _trained(study: Study, criterion: str, material: str, name: str) -> MaskSet:
    scored = {control.name: control for control in SCORED}
    mask = _mask(study, criterion, material, scored.get(name, SCORED[0]), False)
    about = {**mask.about, "material": f"{material}, {name}"}
    if name == REDRAWN:
        seed = study.seed + 1
        about |= {"seed": seed, "init": models.fingerprint(study.model(seed))}
    elif name in (SHUFFLED, RANDOM):
        mask = dict(_derived(study, mask))[name]
        if name == RANDOM:
            about |= {"criterion": "random", "material": "none"}
    return replace(mask, about=about)
