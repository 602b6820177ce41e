"""What the page says of how it came about: data, networks, settings, times, and what is left."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dop_fast import __version__
from dop_fast.config import StageConfig
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.report.table import Result
from dop_fast.runs import Run
from dop_fast.stores import PatchStore
from dop_fast.workspace import STAGES, Workspace


class Changed(NamedTuple):
    """A setting that is not at its default."""

    stage: str
    name: str
    value: str
    default: str


class Step(NamedTuple):
    """A command that the workspace still waits for, and what it makes."""

    command: str
    makes: str


NAMED = 5  # images that are named before the rest is counted
TRAIN = Step("dopfast train", "a teacher, unless [teacher] names one")
EXTRACT = Step("dopfast extract", "the concepts of every class")
STITCH = Step("dopfast stitch", "patches that cover most of an image")
PRUNE = Step("dopfast prune", "a mask, scored on the patches")
FINETUNE = Step("dopfast finetune", "a trained sparse network, and the comparison")


def steps(
    store: PatchStore | None, results: Sequence[Result], masks: Mapping[str, MaskSet]
) -> list[Step]:
    """Return what the workspace still waits for, in order."""
    kinds = {result.kind for result in results}
    done = {
        TRAIN: store is not None or "train" in kinds,
        EXTRACT: store is not None,
        STITCH: store is not None and store.stitching is not None,
        PRUNE: bool(masks),
        FINETUNE: "finetune" in kinds,
    }
    return [step for step, is_done in done.items() if not is_done]


def overview(
    workspace: Workspace,
    store: PatchStore | None,
    train: ImageSet | None,
    results: Sequence[Result],
) -> dict[str, str]:
    """Return the facts under the title, by label."""
    facts = {"Data": _data(workspace, store, train), "Teacher": _teacher(workspace, store, results)}
    facts["Network"] = workspace.model.name
    seeds = sorted({result.seed for result in results}) or [workspace.seed]
    facts["Seed" if len(seeds) == 1 else "Seeds"] = ", ".join(map(str, seeds))
    if results:
        total = duration(sum(result.time_s for result in results))
        facts["Training"] = f"{counted(len(results), 'run')}, {total} in all"
    unread = sorted({name for result in results for name in result.unreadable})
    if unread:
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        named = ", ".join(unread[:NAMED])
        facts["Left out"] = f"{counted(len(unread), 'image')} that cannot be read: {named}{more}"
    return facts


def _data(workspace: Workspace, store: PatchStore | None, train: ImageSet | None) -> str:
    parts = [Path(workspace.data.path).name or "not chosen yet"]
    if train is not None:
        parts += [counted(len(train.classes), "class"), f"{len(train):,} training images"]
    elif store is not None:
        parts.append(counted(len(store.header.classes), "class"))
    return ", ".join([*parts, f"{workspace.data.size} px"])


def _teacher(workspace: Workspace, store: PatchStore | None, results: Sequence[Result]) -> str:
    parts = [workspace.teacher.name]
    if store is not None:
        parts.append(f"layer {store.header.layer}")
    parts += [f"{100 * r.top1:.2f} % top-1" for r in results if r.kind == "train"]
    return ", ".join(parts)


Asked = Mapping[str, Sequence[Mapping[str, Any]]]
"""The settings that the things made were made with, by stage."""


def asked(store: PatchStore | None, runs: Sequence[Run], masks: Mapping[str, MaskSet]) -> Asked:
    """Return the settings that the store, the masks and the runs recorded."""
    return {
        "extract": [store.header.config] if store else [],
        "stitch": [store.stitching] if store and store.stitching else [],
        "prune": [mask.about["settings"] for mask in masks.values() if "settings" in mask.about],
        "train": [run.about.settings for run in runs if run.about.kind == "train"],
        "finetune": [run.about.settings for run in runs if run.about.kind == "finetune"],
    }


def changed(workspace: Workspace, used: Asked) -> list[Changed]:
    """Return every setting that is not at its default; where several were used, all of them.

    dopfast.toml tells only of stages that have made nothing yet.
    """
    rows: list[Changed] = []
    for stage, config in (
        ("data", replace(workspace.data, path="")),  # the path stands above
        ("teacher", workspace.teacher),
        ("model", workspace.model),
    ):
        rows += _changed(stage, type(config), [config.to_dict()])
    for stage, kind in STAGES.items():
        rows += _changed(stage, kind, used.get(stage) or [workspace.stages.get(stage, {})])
    return rows


def _changed(
    stage: str, kind: type[StageConfig], used: Sequence[Mapping[str, Any]]
) -> Iterator[Changed]:
    for name, default in kind().to_dict().items():
        plain = _plain(default)
        values = list(dict.fromkeys(_plain(values.get(name, default)) for values in used))
        if values != [plain]:
            yield Changed(stage, name, " / ".join(values), plain)


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else "none"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural where it is not one."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """Write a time span with its two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def versions(runs: Sequence[Run]) -> str:
    """Return the versions that the runs recorded, and when they ran."""
    kinds = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in run.versions.items()) for run in runs
    )
    if not runs:
        return f"dopfast {__version__}"
    first, last = min(run.started for run in runs), max(run.finished or "" for run in runs)
    return f"{' / '.join(kinds)}. Trained from {_clock(first)} to {_clock(last)} UTC."


def _clock(iso: str) -> str:
    return iso[:16].replace("T", " ")
