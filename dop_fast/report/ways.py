"""Ways of pruning: what tells the masks and the runs of a workspace apart, and their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from dop_fast.masks import MaskSet
from dop_fast.runs import WITHOUT_EFFECT, Run

APART = " · "
IN_THE_NAME = {"criterion", "material", "sparsity"}


def series(criterion: str | None, material: str | None) -> str:
    """Name a way of pruning; a criterion that needs no data stands alone."""
    if criterion is None:
        return "dense"
    return criterion if material in (None, "", "none") else f"{criterion}{APART}{material}"


def family(way: str) -> str:
    """Return the criterion of a way that uses data, and nothing for the others."""
    label = way.partition(" (")[0]
    return label.partition(APART)[0] if APART in label else ""


def key(way: str) -> str:
    """Return what a way is coloured by: its material, or all of a way that uses no data."""
    return way.removeprefix(family(way) + APART)


def told_apart(labelled: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Name each by its label and, where labels are equal, by the settings that differ as well."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for label, settings in labelled:
        alike.setdefault(label, []).append(settings)
    differ = {label: _differing(settings) for label, settings in alike.items()}
    names = []
    for label, settings in labelled:
        values = [f"{key} {settings[key]}" for key in differ[label] if key in settings]
        names.append(label + (f" ({', '.join(values)})" if values else ""))
    return names


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = sorted({key for one in settings for key in one})
    return [key for key in keys if len({repr(one.get(key)) for one in settings}) > 1]


def of_masks(masks: Mapping[str, MaskSet]) -> dict[str, str]:
    """Return the way that each mask was made, by its name."""
    labelled = {name: _mask(mask.about) for name, mask in masks.items()}
    for _, settings in labelled.values():  # a mask like another: all seeds of that are one way
        if settings.get("like") in labelled:
            settings["like"] = labelled[settings["like"]][0]
    return dict(zip(masks, told_apart(list(labelled.values())), strict=True))


def _mask(about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    asked = {**about.get("settings", {}), "model": about.get("model")}
    settings = {name: value for name, value in asked.items() if name not in IN_THE_NAME}
    # of the store: its settings are not the mask's, but other patches give another way
    settings["patches"] = about.get("patches", "")[:8]
    return series(about.get("criterion", "mask"), about.get("material")), settings


def of_runs(runs: Sequence[Run], masks: Mapping[str, str]) -> dict[str, str]:
    """Return the way that each run was pruned and trained, by its name, from those of `masks`."""
    labelled = []
    for run in runs:
        facts = run.about.facts
        plain = series(facts.get("criterion"), facts.get("material"))
        label = "teacher" if run.about.kind == "train" else masks.get(facts.get("mask", ""), plain)
        asked = {**run.about.settings, "model": facts.get("model")}
        settings = {name: value for name, value in asked.items() if name not in WITHOUT_EFFECT}
        labelled.append((label, settings))
    return dict(zip((run.name for run in runs), told_apart(labelled), strict=True))
