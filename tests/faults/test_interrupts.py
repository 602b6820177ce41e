"""Ctrl-C at any moment: what it says, what it leaves, and that the same command then works."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_space import Run

from dop_fast import demo, disk, doctor, images, models, seals, stores
from dop_fast.cli.main import COMMANDS

SWEEP = """
criteria = ["random"]
materials = ["images"]
sparsities = [0.5]
seeds = 1
finetune = {epochs = 1}
"""
ARGUMENTS = {
    "init": "--data data --size 32 --teacher resnet20",
    "sweep": "one.toml",
    "sanity": "--criterion snip --material images --start 6 --budget 12 --splits 2 --per-class 2",
    "show": "concepts",
    "export": "dense",
    "import": "masks/snip-stitched-0.9-s0.safetensors --name theirs",
    "demo": "-o drawn",
}
PLACES: tuple[tuple[Any, str], ...] = (
    (images.ImageSet, "attempt"), (models, "build"), (stores.PatchWriter, "write"),
    (stores, "_write_shard"), (seals, "has"), (doctor, "_checked"), (demo, "write_images"),
    (disk, "replacing"), (os, "fsync"),  # the last while something is being written
)  # fmt: skip
ENDLESS, DEMO = ("demo",), 12  # what takes minutes is not run to its end, but to this moment
UNFORCED = ("report", "show", "verify", "doctor", *ENDLESS)
RESUMED = ("extract", "stitch", "demo")  # what they have begun is marked as partial


class Moments:
    """Moments of a command's work, counted as they come; at one of them Ctrl-C may come too."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.stop = 0, 0
        for holder, name in PLACES:
            patch.setattr(holder, name, self._seen(getattr(holder, name)))

    def _seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.stop:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return seen


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_says_what_is_safe_and_the_same_command_goes_on(
    finished: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def fresh() -> None:
        monkeypatch.chdir(tmp_path)
        shutil.rmtree("space", ignore_errors=True)
        shutil.copytree(finished, "space", symlinks=True)
        monkeypatch.chdir(tmp_path / "space")
        Path("one.toml").write_text(SWEEP, encoding="utf-8")

    monkeypatch.setattr(demo, "write_images", partial(demo.write_images, train=8, val=2))
    moments = Moments(monkeypatch)
    command = [name, *ARGUMENTS.get(name, "").split()]
    if name not in UNFORCED:
        command.append("--force")
    if name not in ENDLESS:
        fresh()
        assert run(*command).code == 0
    last = moments.count or DEMO
    for at in (1, last // 2 or 1, round(0.9 * last) or 1):  # threads count a little unevenly
        fresh()
        moments.count, moments.stop = 0, at
        told = run(*command, "--json")
        assert told.code == 130, told
        error = json.loads(told.out)["error"]
        assert error["kind"] == "interrupted"
        assert "interrupted; what is finished is kept" in error["message"]
        assert "run the same command again" in error["hint"]
        assert name in RESUMED or not list(Path().rglob("*.partial"))
        assert not list(Path("claims").iterdir())
        moments.count, moments.stop = 0, DEMO if name in ENDLESS else 0
        again = run(*command)
        assert again.code == (130 if name in ENDLESS else 0), again
        assert not list(Path().rglob("*.partial"))
