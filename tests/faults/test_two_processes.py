"""Two processes on one workspace: the second one says who is at work, and harms nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_space import Run, contents

from dop_fast import workspace
from dop_fast.claims import BEAT_S, Claims
from dop_fast.pipeline.opening import store_key

MASK = "snip-stitched-0.9-s0"
CLAIMED = {
    "extract --force": "store",
    "stitch --force": "store",
    "train --force": "run-teacher",
    "prune --force": f"mask-{MASK}",
    f"finetune --force --mask {MASK}": f"run-{MASK}",
    f"import {{space}}/masks/{MASK}.safetensors --force": f"mask-{MASK}",
    "sanity --criterion snip --sparsity 0.9 --start 6 --budget 12": "sanity-0.9-s0",
}
WRITERS = {  # without a claim, and the file that they write
    "report": "report.html",
    "show concepts": "concepts.png",
    "export masks": f"exports/{MASK}-masks.safetensors",
    "export dense": f"exports/{MASK}-dense.safetensors",
}


def key(space: Path, name: str) -> str:
    return store_key(workspace.load(space)) if name == "store" else name


@pytest.mark.parametrize("command", CLAIMED)
def test_what_another_process_works_on_is_left_alone(space: Path, run: Run, command: str) -> None:
    claim = Claims(space / "claims").take(key(space, CLAIMED[command]))
    assert claim is not None
    with claim:
        before = contents(space)
        told = run(*command.format(space=space).split(), "-w", space)
        assert told.code == 1, told
        assert f"process {os.getpid()}" in told.err and "\nhint: " in told.err
        assert contents(space) == before


@pytest.mark.parametrize("command", WRITERS)
def test_two_at_once_leave_one_whole_file(
    space: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The other process writes the file, from its start to its end, while this one does."""
    path = space / WRITERS[command]
    assert run(*command.split(), "-w", space).code == 0
    whole, fsync, others = path.read_bytes(), os.fsync, []
    path.unlink()

    def meanwhile(handle: int) -> None:
        if not others:
            again = [sys.executable, "-m", "dop_fast.cli", *command.split(), "-w", space]
            others.append(subprocess.run(again, capture_output=True, text=True))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    assert run(*command.split(), "-w", space).code == 0
    assert [other.returncode for other in others] == [0], others
    assert path.read_bytes() == whole
    assert not list(space.rglob("*.partial"))


def test_other_masks_and_runs_go_on_meanwhile(space: Path, run: Run) -> None:
    claims = Claims(space / "claims")
    for name in ("store", f"mask-{MASK}", f"run-{MASK}"):
        assert claims.take(key(space, name)) is not None
    assert run("prune", "--criterion", "random", "-w", space).code == 0
    assert run("finetune", "--mask", "random-0.9-s0", "-w", space).code == 0
    assert not list(claims.folder.glob("*random*"))  # given back


def test_a_claim_that_was_never_signed_holds_no_longer_than_its_owner_needs(
    tmp_path: Path,
) -> None:
    claims = Claims(tmp_path)
    path = claims.folder / "a.0.claim"
    path.touch()  # its process was killed between making and signing it
    assert claims.take("a") is None
    os.utime(path, (path.stat().st_mtime - 2 * BEAT_S,) * 2)
    assert claims.take("a") is not None
