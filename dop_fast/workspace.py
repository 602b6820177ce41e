"""A workspace: one folder with dopfast.toml, masks/, runs/ and, unless it says where, patches.zarr.

Every file name of the workspace stands here and nowhere else.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dop_fast import disk, recipes
from dop_fast.config import (
    DataConfig,
    ExtractConfig,
    ModelConfig,
    PruneConfig,
    SanityConfig,
    StitchConfig,
    TeacherConfig,
    TrainConfig,
)
from dop_fast.errors import ConfigError, StoreError, nearest
from dop_fast.settings import StageConfig, is_remote, span

TOML = "dopfast.toml"
STORE = "patches.zarr"
EXPORTS = {
    "dense": "safetensors", "prune": "safetensors", "csr": "safetensors", "masks": "safetensors",
    "onnx": "onnx",
}  # fmt: skip
"""Kinds of file that `interop` writes, and how their names end."""
STAGES: dict[str, type[StageConfig]] = {
    "extract": ExtractConfig,
    "stitch": StitchConfig,
    "prune": PruneConfig,
    "train": TrainConfig,
    "finetune": TrainConfig,
    "sanity": SanityConfig,
}


@dataclass(frozen=True)
class Workspace:
    """What dopfast.toml says; `stages` holds the keys set for each command, not the defaults."""

    root: Path
    seed: int
    data: DataConfig
    teacher: TeacherConfig
    model: ModelConfig
    stages: Mapping[str, Mapping[str, Any]]
    store: str = STORE

    @property
    def patches(self) -> Path | str:
        """The store that `extract` makes: a path, or an fsspec address as it is."""
        return self.store if is_remote(self.store) else self.resolve(self.store)

    @property
    def masks(self) -> Path:
        """The folder of masks that `prune` makes."""
        return self.root / "masks"

    @property
    def runs(self) -> Path:
        """The folder of runs: one folder for each training."""
        return self.root / "runs"

    def mask(self, name: str) -> Path:
        """Return the file of a mask; ConfigError for what is no name."""
        return _named(self.masks, name, ".safetensors")

    def run(self, name: str) -> Path:
        """Return the folder of a run; ConfigError for what is no name."""
        return _named(self.runs, name)

    @property
    def exports(self) -> Path:
        """The folder of files for other programs."""
        return self.root / "exports"

    @property
    def claims(self) -> Path:
        """The folder where processes say what they work on."""
        return self.root / "claims"

    @property
    def sanity(self) -> Path:
        """The folder of what `sanity` measured: a file for each sparsity and seed."""
        return self.root / "sanity"

    @property
    def sweeps(self) -> Path:
        """The folder of what sweeps make: their tables, and stores of other stitched patches."""
        return self.root / "sweeps"

    @property
    def teacher_run(self) -> Path:
        """The run that trains the teacher."""
        return self.runs / "teacher"

    @property
    def teacher_weights(self) -> Path:
        """Where `train` puts the teacher."""
        return self.root / "teacher.safetensors"

    @property
    def report(self) -> Path:
        """The page that `report` makes."""
        return self.root / "report.html"

    def resolve(self, path: str) -> Path:
        """Return a path of dopfast.toml as seen from the workspace."""
        return self.root / Path(path).expanduser()


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file says; ConfigError where it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", "mend that line") from error


def _named(folder: Path, name: str, ending: str = "") -> Path:
    """Return a file or folder of that name; ConfigError where it would lie elsewhere."""
    if name == ".." or Path(name).name != name:
        raise ConfigError(
            f"{name!r} is no name: it may not lead to another folder", "give one without slashes"
        )
    return folder / f"{name}{ending}"


def load(root: Path) -> Workspace:
    """Read the workspace at `root`; ConfigError where there is none or it has a wrong key."""
    _encoded(str(root))
    path = root / TOML
    if not path.is_file():
        raise ConfigError(
            f"{root} is not a dopfast workspace: it has no {TOML}",
            "make one: dopfast init --data DIR, or name one with -w DIR",
        )
    content = read_toml(path)
    seed = content.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed must be a whole number, got {seed!r}", f"mend it in {path}")
    store = content.pop("store", STORE)
    if not isinstance(store, str) or not store:
        raise ConfigError(
            f"store must be a path or an address, got {store!r}", f"mend it in {path}"
        )
    sections: dict[str, type[StageConfig]] = {
        "data": DataConfig,
        "teacher": TeacherConfig,
        "model": ModelConfig,
        **STAGES,
    }
    for name, values in content.items():
        if name not in sections or not isinstance(values, dict):
            known = ("seed", "store", *(f"[{section}]" for section in sections))
            wrong = f"[{name}]" if isinstance(values, dict) else name
            raise ConfigError(
                f"{path} has an unknown section or key: {name}", nearest(wrong, known)
            )
        sections[name].from_dict(values, name)  # refuses unknown keys and wrong values now
    return Workspace(
        root,
        seed,
        DataConfig.from_dict(content.get("data", {}), "data"),
        TeacherConfig.from_dict(content.get("teacher", {}), "teacher"),
        ModelConfig.from_dict(content.get("model", {}), "model"),
        {name: content.get(name, {}) for name in STAGES},
        store,
    )


def create(workspace: Workspace, *, force: bool = False) -> Path:
    """Write dopfast.toml with every key and its meaning; keys not set stand as comments.

    StoreError where there is another one, unless `force` replaces it.
    """
    lines = ["# Settings of a dopfast workspace. Flag > environment > this file > default.", ""]
    lines += ["# every random stream follows from this number", f"seed = {workspace.seed}"]
    lines += ["# patches: a folder of their own, or an fsspec address such as s3://bucket/x.zarr"]
    lines += [f"store = {_toml(workspace.store)}"]
    for name, config in (
        ("data", workspace.data),
        ("teacher", workspace.teacher),
        ("model", workspace.model),
    ):
        lines += _section(name, config, set(config.to_dict()))
    for name, stage in STAGES.items():
        values = workspace.stages.get(name, {})
        lines += _section(name, stage.from_dict(values, name), set(values))
        if stage is TrainConfig:
            mark = "" if "recipe" in values else "# "
            lines += [f"# published settings to start from: {', '.join(recipes.names())}"]
            lines += [f"{mark}recipe = {_toml(values.get('recipe', 'paper'))}"]
    workspace.root.mkdir(parents=True, exist_ok=True)
    path = workspace.root / TOML
    content = _encoded("\n".join(lines) + "\n")
    if path.exists() and path.read_bytes() != content and not force:
        raise StoreError(
            f"{workspace.root} is a workspace already", "make it anew: dopfast init --force ..."
        )
    disk.write(path, content)
    return path


def _encoded(text: str) -> bytes:
    """Return UTF-8; ConfigError for a path that is no text, which no file of weights may have."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        name = ascii(text.splitlines()[text[: error.start].count("\n")])
        raise ConfigError(f"a name is not UTF-8: {name}", "rename that folder") from error


def _section(name: str, config: StageConfig, given: set[str]) -> list[str]:
    about = (type(config).__doc__ or "").splitlines()[0]
    lines = ["", f"# {about}", f"[{name}]"]
    values = config.to_dict()
    for item in fields(config):
        choices = item.metadata["choices"]
        allowed = " | ".join(choices) if choices else span(item)
        help_text = item.metadata["help"] + (f"  {allowed}" if allowed else "")
        mark = "" if item.name in given else "# "
        lines += [f"# {help_text}", f"{mark}{item.name} = {_toml(values[item.name])}"]
    return lines


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
