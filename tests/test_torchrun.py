"""The commands as torchrun starts them: who speaks, what is refused, and ranks that are killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from together import together

from dop_fast import models, pipeline, runs, workspace
from dop_fast.cli.main import dopfast
from dop_fast.config import TrainConfig

TRAIN = TrainConfig(epochs=8, batch_size=12, lr=0.02)
OPTIONS = ("--epochs", "8", "--batch-size", "12", "--lr", "0.02", "--device", "cpu")


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Path:
    root = tmp_path / "space"
    pipeline.init(
        root, data=str(tiny_images), size=32, teacher="resnet20", model="", seed=0, force=False
    )
    return root


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, *arguments: str) -> Result:
    """Run a command as one of two ranks would that do not meet."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    return CliRunner().invoke(dopfast, arguments)


def test_what_needs_no_ranks_is_done_by_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_images: Path
) -> None:
    init = ("init", "-w", str(tmp_path), "--data", str(tiny_images), "--size", "32")
    other = as_rank(monkeypatch, 1, *init)
    assert (other.exit_code, other.output, list(tmp_path.iterdir())) == (0, "", [])
    first = as_rank(monkeypatch, 0, *init)
    assert first.exit_code == 0 and "3 classes" in first.output


def test_settings_are_shown_by_the_first_rank(monkeypatch: pytest.MonkeyPatch, space: Path) -> None:
    shown = [as_rank(monkeypatch, rank, "prune", "-w", str(space), "--dry-run") for rank in (0, 1)]
    assert "criterion" in shown[0].output and shown[1].output == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "any.toml"), "each process has its own work"),
        (("prune", "--device", "cuda:1"), "a GPU of its own"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, space: Path, arguments: tuple[str, ...], words: str
) -> None:
    refused = as_rank(monkeypatch, 0, *arguments, "-w", str(space))
    assert words in str(refused.exception)


def test_a_job_that_is_started_anew_goes_on_although_it_was_forced(
    monkeypatch: pytest.MonkeyPatch, space: Path
) -> None:
    command = ["train", "-w", str(space), *OPTIONS, "--epochs", "1", "--force"]

    def first_epoch() -> float:
        assert CliRunner().invoke(dopfast, command).exit_code == 0
        return runs.metrics(space / "runs" / "teacher")[0]["time_s"]

    begun = first_epoch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_epoch() == begun
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert first_epoch() != begun


# --- with processes


def torchrun(root: Path, restarts: int) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), "-m", "dop_fast.cli", "train", "-w", str(root), *OPTIONS,
    ]  # fmt: skip
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill_second_rank(job: subprocess.Popen[str]) -> None:
    for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError("there is no second rank")


def until_epoch(job: subprocess.Popen[str], number: int) -> str:
    """Return what was printed up to an epoch's line."""
    seen = []
    for line in job.stderr or ():
        seen.append(line)
        if line.startswith(f"  epoch {number:>3}"):
            return "".join(seen)
    raise AssertionError("".join(seen))


def trained(root: Path) -> None:
    """Do the same by the library alone."""
    for _ in pipeline.train(workspace.load(root), TRAIN, 0, torch.device("cpu")):
        pass


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_a_message_and_restarts_change_nothing(
    space: Path, tmp_path: Path
) -> None:
    untouched = copytree(space, tmp_path / "untouched")
    job = torchrun(space, restarts=0)
    until_epoch(job, 1)
    kill_second_rank(job)
    _, told = job.communicate(timeout=60)
    assert job.returncode != 0
    assert told.count("error: a rank of this job was lost; torchrun says which one") == 1, told
    assert "hint: run the same command again to go on" in told
    assert "Signal 9 (SIGKILL)" in told.split("Root Cause")[1]
    done = len(runs.metrics(space / "runs" / "teacher"))
    assert 1 <= done < TRAIN.epochs

    job = torchrun(space, restarts=1)
    until_epoch(job, done + 1)
    kill_second_rank(job)
    out, told = job.communicate(timeout=120)
    assert job.returncode == 0, told
    assert out.count("teacher: top-1") == 1
    together(2, trained, untouched)
    weights = [load_file(root / "teacher.safetensors") for root in (space, untouched)]
    assert models.fingerprint(weights[0]) == models.fingerprint(weights[1])
