"""What the page says of how it came about: data, networks, settings, times, what is left."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.report.table import Result
from dop_fast.runs import MANIFEST, WITHOUT_EFFECT, Run
from dop_fast.settings import StageConfig
from dop_fast.stores import PatchStore
from dop_fast.workspace import STAGES, Workspace


class Setting(NamedTuple):
    """A setting of a stage as it was used, where several values were, all of them.

    `sources` says where the values came from, as far as it was recorded.
    """

    stage: str
    name: str
    value: str
    default: str
    sources: str
    several: bool

    @property
    def changed(self) -> bool:
        """Whether it is not at its default."""
        return self.value != self.default


class Made(NamedTuple):
    """Runs that were trained with the same versions on the same kind of device."""

    versions: str
    commit: str
    device: str
    runs: int
    began: str
    ended: str


class Step(NamedTuple):
    """A command that the workspace still waits for, and what it makes."""

    command: str
    makes: str


NAMED = 5  # images, and values of a setting, before the rest is counted
NOTHING = "\N{EN DASH}"
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
    return ", ".join([*parts, f"{workspace.data.size}\N{NO-BREAK SPACE}px"])


def _teacher(workspace: Workspace, store: PatchStore | None, results: Sequence[Result]) -> str:
    parts = [workspace.teacher.name]
    if store is not None:
        parts.append(f"layer {store.header.layer}")
    parts += [f"{100 * r.top1:.2f} % top-1" for r in results if r.kind == "train"]
    return ", ".join(parts)


Used = Mapping[str, Sequence[tuple[Mapping[str, Any], Mapping[str, str]]]]
"""By stage the settings that things were made with, each with the sources of its values."""


def used(store: PatchStore | None, runs: Sequence[Run], masks: Mapping[str, MaskSet]) -> Used:
    """Return the settings that the store, the masks and the runs recorded."""
    stitching = store.stitching if store else None
    pruned = [mask.about["settings"] for mask in masks.values() if "settings" in mask.about]
    return {
        "extract": [(store.header.config, {})] if store else [],
        "stitch": [(stitching, {})] if stitching else [],
        "prune": [(settings, {}) for settings in pruned],
        **{
            kind: [
                (run.about.settings, run.about.sources) for run in runs if run.about.kind == kind
            ]
            for kind in ("train", "finetune")
        },
    }


def settings(workspace: Workspace, used: Used) -> list[Setting]:
    """Return every setting of every stage that was run.

    dopfast.toml tells only of stages that have made nothing yet, and there of what it changes.
    """
    rows: list[Setting] = []
    for stage, config in (
        ("data", workspace.data),
        ("teacher", workspace.teacher),
        ("model", workspace.model),
    ):
        rows += _settings(stage, type(config), [(config.to_dict(), {})])
    rows = [row for row in rows if (row.stage, row.name) != ("data", "path")]  # it stands above
    for stage, kind in STAGES.items():
        planned = _settings(stage, kind, [(workspace.stages.get(stage, {}), {})])
        recorded = used.get(stage)
        rows += (
            _settings(stage, kind, recorded)
            if recorded
            else [row for row in planned if row.changed]
        )
    return rows


def _settings(
    stage: str,
    kind: type[StageConfig],
    used: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]],
) -> Iterator[Setting]:
    for name, default in kind().to_dict().items():
        values = list(dict.fromkeys(_plain(given.get(name, default)) for given, _ in used))
        sources = dict.fromkeys(told[name] for _, told in used if told.get(name))
        more = f" and {len(values) - NAMED} more" if len(values) > NAMED + 1 else ""
        shown = " / ".join(values[:NAMED] if more else values) + more
        told = " / ".join(sources)
        yield Setting(stage, name, shown, _plain(default), told, len(values) > 1)


def made(runs: Sequence[Run]) -> list[Made]:
    """Return with what the runs were trained, and when: first to last, in UTC."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        groups.setdefault((versions, run.commit or "", run.about.device), []).append(run)
    return [
        Made(
            *way,
            len(group),
            _clock(min(run.started for run in group)),
            _clock(max(run.finished or "" for run in group)),
        )
        for way, group in groups.items()
    ]


def unlike(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings in which fine-tunings differ, and so more than their masks."""
    of_training = [row for row in settings if row.stage == "finetune" and row.several]
    return [row for row in of_training if row.name not in WITHOUT_EFFECT]


def unfinished(workspace: Workspace, finished: Sequence[Run]) -> list[str]:
    """Return the names of the runs that are not among those `finished`."""
    begun = sorted(path.parent.name for path in workspace.runs.glob(f"*/{MANIFEST}"))
    return [name for name in begun if name not in {run.name for run in finished}]


def inputs(store: PatchStore | None, train: ImageSet | None) -> dict[str, str]:
    """Return the marks of what went in: equal marks, equal images and weights."""
    found = {}
    if train is not None:
        found["Images now"] = train.fingerprint
    if store is not None:
        found |= {"Images of the concepts": store.header.data, "Teacher": store.header.teacher}
    return found


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or NOTHING
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else NOTHING


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


def _clock(iso: str) -> str:
    return iso[:16].replace("T", " ")
