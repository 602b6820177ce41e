"""Trainings that are killed, really, and go on."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_training import MOMENTS, train
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_training import CONFIG, DATA, fit, network, untimed

from dop_fast import runs
from dop_fast.errors import StoreError
from dop_fast.training import Epoch, checkpoint
from dop_fast.training.state import State
from dop_fast.training.step import Step


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of trainings, each killed at the moment that it is called by."""
    folder = tmp_path_factory.mktemp("killed")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, str(here / "killed_training.py"), str(folder), *MOMENTS],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(MOMENTS), done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Epoch]]:
    """Return a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_training_goes_on_bit_for_bit(
    killed: Path, whole: tuple[Path, list[Epoch]], moment: str
) -> None:
    broken, (unbroken, expected) = killed / moment, whole
    assert not (broken / runs.WEIGHTS).exists()
    assert untimed(train(broken)) == untimed(expected)
    assert [row["train_loss"] for row in runs.metrics(broken)] == [e.train_loss for e in expected]
    names = [sorted(path.name for path in folder.iterdir()) for folder in (broken, unbroken)]
    assert names[0] == names[1]
    for name in (runs.CHECKPOINT, runs.BEST, runs.WEIGHTS, runs.AVERAGE):
        one, other = load_file(unbroken / name), load_file(broken / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    with safe_open(broken / runs.BEST, framework="pt") as file:
        assert file.metadata()["epoch"] == "2"


def test_the_best_epoch_s_weights_are_those_it_was_measured_with(
    whole: tuple[Path, list[Epoch]],
) -> None:
    folder, epochs = whole
    assert [epoch.best_top1 for epoch in epochs].index(max(e.best_top1 for e in epochs)) == 1
    with safe_open(folder / runs.BEST, framework="pt") as file:
        said = {"model": "tiny", "epoch": "2", "top1": f"{epochs[1].ema_top1:.6f}"}
        assert file.metadata().items() >= said.items()


def test_the_checkpoint_holds_the_mask_and_nothing_that_runs_code(
    whole: tuple[Path, list[Epoch]],
) -> None:
    tensors = load_file(whole[0] / runs.CHECKPOINT)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"model", "momentum", "average", "mask"}
    keep = np.unpackbits(tensors["mask.0.weight"].numpy(), count=216)
    assert np.array_equal(keep == 1, (tensors["model.0.weight"] != 0).flatten().numpy())


def test_a_full_disk_keeps_the_last_checkpoint_and_the_training_goes_on(
    tmp_path: Path, small_disk: Path
) -> None:
    expected = list(fit(tmp_path / "whole", network(), CONFIG))
    epochs = fit(small_disk / "run", network(), CONFIG)
    next(epochs)
    checkpoint = small_disk / "run" / runs.CHECKPOINT
    stored = checkpoint.read_bytes()
    with (small_disk / "other").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match=r"the disk is full: .* needs \d+ kB, \d+ are free"):
        next(epochs)
    assert checkpoint.read_bytes() == stored
    (small_disk / "other").unlink()
    assert untimed(list(fit(small_disk / "run", network(), CONFIG))) == untimed(expected)


def test_the_scaler_goes_on_where_it_was() -> None:
    states = []
    for scale in (1024.0, 8.0):
        step = Step(network(), DATA, replace(CONFIG, amp="fp16"), None)
        step.scaler.load_state_dict({**step.scaler.state_dict(), "scale": scale})
        states.append(State(network(), step, None, None))
    states[1].fill(states[0].tensors())
    assert states[1].step.scaler.state_dict() == states[0].step.scaler.state_dict()
    assert states[1].step.scaler.get_scale() == 1024


def test_epochs_are_kept_only_when_asked_for(tmp_path: Path) -> None:
    list(fit(tmp_path, network(), replace(CONFIG, keep_every=2)))
    kept = sorted(path.name for path in tmp_path.glob("epoch-*"))
    assert kept == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    last, fresh = (load_file(tmp_path / name) for name in (kept[-1], runs.WEIGHTS))
    assert all(torch.equal(last[name], fresh[name]) for name in fresh)


def test_of_equal_epochs_the_first_is_the_best(tmp_path: Path) -> None:
    tops = []
    for top in (0.5, 0.75, 0.75, 0.25):
        tops.append(top)
        weights = {"epoch": torch.tensor(float(len(tops)))}
        checkpoint.keep_epoch(tmp_path, weights, tops, 0, {"model": "tiny"})
    assert load_file(tmp_path / runs.BEST)["epoch"] == 2
    assert [path.name for path in tmp_path.iterdir()] == [runs.BEST]
