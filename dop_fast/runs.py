"""A run: the folder of one training, and everything needed to trust or to repeat it.

manifest.json           what was asked, on what, with which versions; written first, completed last
metrics.jsonl           one JSON object an epoch
checkpoint.safetensors  the last finished epoch, to go on from
best.safetensors        the network after the epoch of the best top-1, named in its metadata
weights.safetensors     the trained network
ema.safetensors         the running average of its weights, where one was asked for
"""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dop_fast import __version__, disk
from dop_fast.errors import StoreError

SCHEMA, VERSION = "dopfast.run", 1
MANIFEST, METRICS = "manifest.json", "metrics.jsonl"
CHECKPOINT, WEIGHTS = "checkpoint.safetensors", "weights.safetensors"
BEST, AVERAGE, EPOCH = "best.safetensors", "ema.safetensors", "epoch-{:04}.safetensors"
BOARD = "tensorboard"
WITHOUT_EFFECT = frozenset({"workers", "keep_every", "tensorboard"})
"""Settings that do not change what comes out."""

START_OVER = "replace it with --force, or give another --name"


@dataclass(frozen=True)
class About:
    """What a run is asked to do; equal `kind`, `facts` and `settings` mean the same run.

    `facts` are what settings do not say (model, mask, data, seed), as JSON values. `sources` says
    of each setting where its value came from; `device` where the run began.
    """

    kind: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"


@dataclass(frozen=True)
class Run:
    """A run as its manifest tells it; `finished` is None, and `result` empty, until it is done.

    Times are ISO 8601 in UTC. `commit` is dopfast's own, where it runs from a git checkout, with
    "-dirty" behind it where files differ.
    """

    folder: Path
    about: About
    versions: Mapping[str, str]
    commit: str | None
    started: str
    finished: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


def begin(folder: Path, about: About, force: bool = False) -> Run:
    """Start the run in `folder`, or return the same run that stands there, finished or not.

    A run of other settings raises StoreError; `force` deletes whatever run is there. A folder
    with files that is no run is never touched.
    """
    if folder.is_dir() and not disk.only_begun(folder, MANIFEST):
        there = read(folder)
        if not force:
            _refuse_other(there, about)
            return there
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, about, _versions(), _commit(), _now())
    (folder / CHECKPOINT).unlink(missing_ok=True)  # nothing goes on from that of another run
    write_json(folder / MANIFEST, _manifest(run))  # a finished one never stands above no weights
    for path in folder.iterdir():
        if path.name != MANIFEST:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def finish(folder: Path, result: Mapping[str, Any]) -> Run:
    """Complete the manifest with what came out."""
    run = read(folder)
    done = Run(folder, run.about, run.versions, run.commit, run.started, _now(), dict(result))
    write_json(folder / MANIFEST, _manifest(done))
    return done


def read(folder: Path) -> Run:
    """Return the run in `folder`; StoreError where there is none, or one of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} is not a run: it has no {MANIFEST}", "give another --name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON: {error}", "delete the folder") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or content.get("version") != VERSION:
        raise StoreError(
            f"{path} is not {SCHEMA} version {VERSION}, the one that this dopfast reads",
            "give another --name, or delete the folder",
        )
    try:
        return _run(folder, content)
    except (LookupError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged: it lacks {error}", "delete the folder") from error


def _run(folder: Path, content: Mapping[str, Any]) -> Run:
    settings = content["settings"]
    about = About(
        content["kind"],
        content["facts"],
        {key: entry["value"] for key, entry in settings.items()},
        {key: entry["source"] for key, entry in settings.items() if entry["source"]},
        content["device"],
    )
    return Run(
        folder,
        about,
        content["versions"],
        content["commit"],
        content["started"],
        content["finished"],
        content["result"],
    )


def finished_runs(folder: Path) -> list[Run]:
    """Return the finished runs below `folder`, by name; other folders are left out."""
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            run = read(path.parent)
        except StoreError:  # another program's, or another version's
            continue
        if run.finished:
            found.append(run)
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return what was measured after each epoch, first epoch first; none before the first."""
    path = folder / METRICS
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged: {error}", "delete it, and run the same training again"
        ) from error


def write_metrics(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the metrics by `rows`, one an epoch."""
    text = "".join(json.dumps(dict(row)) + "\n" for row in rows)
    disk.write(folder / METRICS, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON; a reader sees the old file or the new one."""
    disk.write(path, (json.dumps(content, indent=2) + "\n").encode())


def _manifest(run: Run) -> dict[str, Any]:
    about = run.about
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "kind": about.kind,
        "facts": dict(about.facts),
        "settings": {
            key: {"value": value, "source": about.sources.get(key, "")}
            for key, value in about.settings.items()
        },
        "versions": dict(run.versions),
        "commit": run.commit,
        "device": about.device,
        "started": run.started,
        "finished": run.finished,
        "result": dict(run.result),
    }


def _refuse_other(there: Run, about: About) -> None:
    old, new = _identity(there.about), _identity(about)
    differ = [
        f"{part[-1]} {old.get(part)!r}, not {new.get(part)!r}"
        for part in sorted(old.keys() | new.keys())
        if old.get(part) != new.get(part)
    ]
    if differ:
        raise StoreError(f"{there.folder} is a run with {'; '.join(differ)}", START_OVER)


def _identity(about: About) -> dict[tuple[str, str], Any]:
    parts = {
        ("", "kind"): about.kind,
        **{("facts", key): value for key, value in about.facts.items()},
        **{
            ("settings", key): about.settings[key] for key in about.settings.keys() - WITHOUT_EFFECT
        },
    }
    return {part: json.loads(json.dumps(value)) for part, value in parts.items()}  # lists, as read


def _versions() -> dict[str, str]:
    return {
        "dopfast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Return the commit of dopfast's own checkout; None where it was installed as a package."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed copy can lie inside a repository (a .venv): then git does not track it
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
