"""Trainings that end themselves by SIGKILL, each in a process of its own: `FOLDER MOMENT...`."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from array_images import noisy
from tiny_training import CONFIG, DATA, fit, network

from dop_fast import models, runs
from dop_fast.masks import MaskSet
from dop_fast.models import weights
from dop_fast.training import Epoch, TrainData, loop
from dop_fast.training.step import Step

SETTINGS = replace(CONFIG, epochs=3, lr=0.1, milestones=(), ema=0.1)
IMAGES = TrainData(noisy(96, 0), noisy(48, 1), DATA)


def train(folder: Path) -> list[Epoch]:
    """Train for three epochs of twelve steps; the second epoch is the best."""
    model = network()
    rng = torch.Generator().manual_seed(0)
    kept = {
        name: torch.rand(weight.shape, generator=rng) < 0.9
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }
    return list(fit(folder, model, SETTINGS, MaskSet(kept), IMAGES))


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable[..., Any], end: Callable[..., Any] = die) -> Any:
    """Return the function, but that its call of that number, from 1, is `end`'s."""
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return (end if calls == number else function)(*arguments)

    return counted


def half(tensors: object, path: Path, metadata: object) -> None:
    path.write_bytes(b"x" * 5000)
    die()


MOMENTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "in a step": (Step, "__call__", lambda call: at_call(20, call)),
    "while a checkpoint is written": (weights, "save_file", lambda save: at_call(3, save, half)),
    "before a checkpoint gets its name": (Path, "replace", lambda rename: at_call(5, rename)),
    "before the metrics": (runs, "write_metrics", lambda write: at_call(3, write)),
    "before the best weights": (loop, "keep_epoch", lambda keep: at_call(2, keep)),
    "before the final weights": (models, "save_weights", lambda save: at_call(1, save)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]) / "whole")  # whatever is imported late is imported once
    for moment in sys.argv[2:]:
        child = os.fork()
        if not child:
            where, name, ended = MOMENTS[moment]
            setattr(where, name, ended(getattr(where, name)))
            train(Path(sys.argv[1]) / moment)
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]))
