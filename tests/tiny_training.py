"""A tiny training: its network, mask, images and settings."""

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import torch
from array_images import noisy
from torch import nn

from dop_fast import training
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.masks import MaskSet
from dop_fast.training import Epoch, Fitted, TrainData
from dop_fast.types import Track, untracked

CPU = torch.device("cpu")
ABOUT = {"model": "tiny"}
DATA = DataConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CONFIG = TrainConfig(epochs=4, lr=0.05, batch_size=8, weight_decay=1e-2, amp="off")


TRAIN_DATA = TrainData(noisy(36, 0), noisy(18, 1), DATA)


def network(dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8, 3),
        )


def half_mask(model: nn.Module) -> MaskSet:
    rng = torch.Generator().manual_seed(0)
    return MaskSet(
        {
            name: torch.rand(weight.shape, generator=rng) < 0.5
            for name, weight in model.named_parameters()
            if weight.dim() > 1
        }
    )


def fit(
    folder: Path,
    model: nn.Module,
    config: TrainConfig = CONFIG,
    masks: MaskSet | None = None,
    data: TrainData = TRAIN_DATA,
    seed: int = 0,
    track: Track = untracked,
) -> Generator[Epoch, None, Fitted]:
    return training.fit(
        model, data, config, folder, masks=masks, seed=seed, device=CPU, about=ABOUT, track=track
    )


def untimed(epochs: list[Epoch]) -> list[Epoch]:
    return [replace(epoch, images_per_s=0, time_s=0) for epoch in epochs]


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
