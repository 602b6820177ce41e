"""Training by several ranks: the batches, the mask and the resumption of one process."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from array_images import Arrays, noisy
from PIL import Image
from tiny_training import CONFIG, CPU, DATA, fit, half_mask, network, untimed
from together import together
from torch import nn

from dop_fast import models, training
from dop_fast.errors import DataError
from dop_fast.training import Epoch, Fitted, TrainData
from dop_fast.training.loader import own_part
from dop_fast.types import untracked

SHARED = TrainData(noisy(34, 0), noisy(17, 1), DATA)
UNEVEN = replace(CONFIG, batch_size=9)  # of which two ranks take 5 and 4, and 4 and 3 of the last
FOUR = pytest.param(4, marks=pytest.mark.slow)


def without_norm() -> nn.Module:
    model = network(dropout=0)
    model[1] = nn.Identity()
    return model


def fitted(
    folder: Path, model: nn.Module, epochs: int = UNEVEN.epochs, ema: float = 0.0
) -> tuple[dict[str, torch.Tensor], list[Epoch]]:
    """Return the weights after so many epochs of a training with half of them removed."""
    steps = fit(folder, model, replace(UNEVEN, ema=ema), half_mask(model), SHARED)
    seen = [next(steps) for _ in range(epochs)]
    return dict(model.state_dict()), untimed(seen)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():  # to the rounding of sums in another order
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, FOUR])
def test_without_batch_norm_the_ranks_do_the_steps_of_one_process(
    tmp_path: Path, count: int
) -> None:
    alone, epochs = fitted(tmp_path / "alone", without_norm())
    for weights, seen in together(count, fitted, tmp_path / "ranks", without_norm()):
        close(weights, alone)
        for one, other in zip(epochs, seen, strict=True):
            assert (one.epoch, one.lr, one.top1) == (other.epoch, other.lr, other.top1)
            assert other.train_loss == pytest.approx(one.train_loss, rel=1e-5)
            assert other.val_loss == pytest.approx(one.val_loss, rel=1e-5)


def test_ranks_end_with_equal_weights_and_removed_ones_at_zero(tmp_path: Path) -> None:
    mask = half_mask(network())
    (first, told), (second, also) = together(2, fitted, tmp_path, network())
    assert told == also
    assert models.fingerprint(first) == models.fingerprint(second)
    assert all(not first[name][~keep].any() for name, keep in mask.masks.items())


def momenta() -> dict[str, bool]:
    """Return for each weight whether removed ones, and they alone, have no momentum here."""
    model = network()
    mask = half_mask(model)
    trainer = training.loop._Trainer(model, SHARED, UNEVEN, mask, 0, CPU, untracked)
    trainer.epoch(1)
    found = {name: trainer.state.tensors()[f"momentum.{name}"] for name in mask.masks}
    return {
        name: not found[name][~keep].any() and bool(found[name][keep].any())
        for name, keep in mask.masks.items()
    }


def test_removed_weights_gather_no_momentum_on_any_rank() -> None:
    for found in together(2, momenta):
        assert len(found) == 3 and all(found.values())


def test_interrupted_ranks_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    (whole, epochs), _ = together(2, fitted, tmp_path / "whole", network(), 4, 0.9)
    together(2, fitted, tmp_path / "parts", network(), 2, 0.9)
    for weights, seen in together(2, fitted, tmp_path / "parts", network(), 4, 0.9):
        assert models.fingerprint(weights) == models.fingerprint(whole)
        assert seen == epochs


@dataclass(frozen=True)
class Damaged(Arrays):
    """Of which one image cannot be read."""

    def open(self, index: int) -> Image.Image:
        if index == 7:
            raise DataError("image 7 is damaged")
        return super().open(index)


def fitted_on_damaged(folder: Path) -> tuple[dict[str, torch.Tensor], list[Epoch], Fitted]:
    images = noisy(120, 0)
    data = replace(SHARED, train=replace(images, source=Damaged(images.source.pixels)))
    model, seen = without_norm(), []
    steps = fit(folder, model, replace(UNEVEN, epochs=1, augment="resized"), None, data)
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return dict(model.state_dict()), untimed(seen), end.value


def test_an_unreadable_image_is_left_out_by_ranks_as_by_one_process(tmp_path: Path) -> None:
    alone, (epoch,), _ = fitted_on_damaged(tmp_path / "alone")
    for weights, (seen,), fitted in together(2, fitted_on_damaged, tmp_path / "ranks"):
        close(weights, alone)
        assert seen.train_loss == pytest.approx(epoch.train_loss, rel=1e-5)
        assert fitted.unreadable == ("7",)


def parts() -> list[list[int]]:
    return [own_part(np.arange(count)).tolist() for count in range(1, 14)]


def test_every_image_of_a_batch_is_one_ranks_and_none_has_a_single_one() -> None:
    for count, batch in enumerate(zip(*together(3, parts), strict=True), start=1):
        assert np.concatenate(batch).tolist() == list(range(count))
        assert all(len(part) >= min(count, 2) for part in batch if part)
