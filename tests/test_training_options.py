import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from array_images import noisy
from safetensors.torch import load_file
from tiny_training import CONFIG, CPU, DATA, TRAIN_DATA, fit, half_mask, network
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchvision.transforms.v2 import RandomErasing

from dop_fast import runs, seeding, training
from dop_fast.config import TrainConfig
from dop_fast.errors import ConfigError
from dop_fast.training import augment, loader
from dop_fast.types import Array, T

ONE_STEP = replace(CONFIG, epochs=1, batch_size=36, augment="none", milestones=())


def logits_of(model: nn.Module) -> torch.Tensor:
    """Return those of the training images, in train mode."""
    pixels = torch.from_numpy(TRAIN_DATA.train.load(range(36))).permute(0, 3, 1, 2)
    found: torch.Tensor = model.train()((pixels / 255 - 0.5) / 0.25)
    return found


def test_a_smoothed_label_is_shared_by_all_classes(tmp_path: Path) -> None:
    (epoch,) = fit(tmp_path, network(0), replace(ONE_STEP, label_smoothing=0.2))
    logs = logits_of(network(0)).log_softmax(1)
    labels = torch.from_numpy(TRAIN_DATA.train.labels)
    target = 0.8 * nn.functional.one_hot(labels, 3) + 0.2 / 3
    # batch norm's sums run in another order: float32's rounding
    assert epoch.train_loss == pytest.approx((-(target * logs).sum(1).mean()).item(), rel=1e-5)


def test_accuracy_is_measured_without_smoothing(tmp_path: Path) -> None:
    still = replace(ONE_STEP, lr=1e-30)
    (smoothed,) = fit(tmp_path / "smoothed", network(0), replace(still, label_smoothing=0.2))
    (plain,) = fit(tmp_path / "plain", network(0), still)
    assert smoothed.val_loss == plain.val_loss
    assert smoothed.train_loss != plain.train_loss


@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterov_looks_ahead(tmp_path: Path, nesterov: bool) -> None:
    model, plain = network(0), network(0)
    list(fit(tmp_path, model, replace(ONE_STEP, epochs=3, nesterov=nesterov)))
    velocity = {name: torch.zeros_like(weight) for name, weight in plain.named_parameters()}
    order = [seeding.stream(0, "order", epoch).permutation(36) for epoch in (1, 2, 3)]
    for index in order:
        loss = nn.functional.cross_entropy(
            logits_of(plain)[index], torch.from_numpy(TRAIN_DATA.train.labels[index])
        )
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for (name, weight), gradient in zip(plain.named_parameters(), gradients, strict=True):
                slope = gradient + 1e-2 * weight
                velocity[name] = 0.9 * velocity[name] + slope
                weight -= 0.05 * (slope + 0.9 * velocity[name] if nesterov else velocity[name])
    for name, weight in plain.named_parameters():
        # three steps in float32, summed in another order
        torch.testing.assert_close(
            dict(model.named_parameters())[name], weight, rtol=1e-4, atol=1e-6
        )


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a momentum"):
        TrainConfig(nesterov=True, momentum=0)


@pytest.mark.parametrize("warm", [0, 10])
def test_the_cosine_is_torch_s(warm: int) -> None:
    steps, config = 40, TrainConfig(schedule="cosine", lr=0.4, warmup=warm / 40)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.4)
    schedule: LRScheduler = CosineAnnealingLR(optimizer, steps - warm)
    if warm:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.4)
        # from the first step's rate to the full one at the last step of the warm-up
        rise = LinearLR(optimizer, 1 / warm, 1.0, warm - 1)
        schedule = SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, 30)], [warm])
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = [training.learning_rate(config, step, steps) for step in range(steps)]
    assert found == pytest.approx(expected)


def test_the_average_is_that_of_all_steps_and_holds_the_mask(tmp_path: Path) -> None:
    model, config = network(0), replace(CONFIG, epochs=2, ema=0.75)
    mask, states = half_mask(model), []

    def after_each(steps: Iterable[T], label: str, total: int) -> Iterator[T]:
        for step in steps:
            yield step
            if "/" not in label or "," in label:  # not a step of an epoch
                continue
            states.append(copy.deepcopy(model.state_dict()))

    epochs = list(fit(tmp_path, model, config, mask, track=after_each))
    found = load_file(tmp_path / runs.AVERAGE)
    assert len(states) == 2 * 5
    for name, value in found.items():
        if not value.is_floating_point():
            continue
        expected = states[0][name].double()
        for state in states[1:]:
            expected = 0.75 * expected + 0.25 * state[name].double()
        # ten lerps in float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    for name, keep in mask.masks.items():
        assert not found[name][~keep].any() and found[name][keep].all()
    averaged = network(0)
    averaged.load_state_dict(found)
    again = training.evaluate(averaged, TRAIN_DATA.val, DATA, CPU, CONFIG.batch_size, "off")
    last = epochs[-1]
    assert (last.ema_top1, last.ema_top5, last.ema_loss) == (again.top1, again.top5, again.loss)
    assert last.ema_loss != last.val_loss
    assert runs.metrics(tmp_path)[-1]["ema_loss"] == last.ema_loss


def test_an_interrupted_average_goes_on(tmp_path: Path) -> None:
    config = replace(CONFIG, ema=0.9)
    list(fit(tmp_path / "whole", network(), config, half_mask(network())))
    epochs = fit(tmp_path / "broken", network(), config, half_mask(network()))
    next(epochs), next(epochs)
    epochs.close()
    list(fit(tmp_path / "broken", network(), config, half_mask(network())))
    for name in (runs.AVERAGE, runs.BEST, runs.WEIGHTS):
        whole, broken = (load_file(tmp_path / of / name) for of in ("whole", "broken"))
        assert whole.keys() == broken.keys()
        assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.parametrize("kind", ["pad", "resized", "none"])
def test_erasing_leaves_the_mean_colour_in_a_box_and_the_rest_alone(kind: str) -> None:
    def pixels_of(share: float) -> Array:
        pixels = loader.Pixels(noisy(36, 0), 0, CPU)
        chunks = loader.training_order(36, 9, 0, 2)
        batches = loader.training_batches(
            pixels, chunks, kind, 0, 2, erasing=share, fill=(0.2, 0.4, 0.6)
        )
        order = np.argsort(np.concatenate(chunks))
        return np.asarray(torch.cat([part for part, _ in batches]).numpy()[order])

    plain, erased, all_erased = pixels_of(0), pixels_of(0.5), pixels_of(1)
    boxes = augment.draw_erasures(36, 8, 0.5, 0, 2)
    lost = 0
    for before, after, (top, left, bottom, right) in zip(plain, erased, boxes, strict=True):
        expected = before.copy()
        expected[top:bottom, left:right] = (51, 102, 153)
        assert np.array_equal(after, expected)
        lost += bottom > top
    assert 8 < lost < 28  # outside: a probability below 0.001
    assert all((one != other).any() for one, other in zip(plain, all_erased, strict=True))


@pytest.mark.parametrize("share", [0.25, 1])
def test_erased_boxes_are_distributed_as_torchvision_s(share: float) -> None:
    count, size = 4000, 32
    boxes = augment.draw_erasures(count, size, share, 0, 1)
    erased = boxes[boxes[:, 2] > boxes[:, 0]]
    assert abs(len(erased) - share * count) <= 4 * math.sqrt(share * (1 - share) * count)
    peer = RandomErasing(1, augment.ERASED_AREA, augment.ERASED_RATIO)
    canvas = [torch.empty(3, size, size, device="meta")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [peer.make_params(canvas) for _ in range(count)]
    theirs = np.array([[box[key] for key in "ijhw"] for box in drawn], float)
    ours = np.concatenate([erased[:, :2], erased[:, 2:] - erased[:, :2]], axis=1)
    assert (ours[:, 2:] < size).all() and (erased[:, 2:] <= size).all()
    deviation = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * deviation).all()
    assert ours.std(0) == pytest.approx(theirs.std(0), rel=0.1)  # four standard errors of 1000


def test_erasing_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    config = replace(ONE_STEP, random_erasing=1.0)
    (plain,) = fit(tmp_path / "plain", network(0), ONE_STEP)
    (one,) = fit(tmp_path / "one", network(0), config)
    (same,) = fit(tmp_path / "same", network(0), config)
    assert one.train_loss == same.train_loss != plain.train_loss
    first, second = (augment.draw_erasures(36, 8, 1, 0, epoch) for epoch in (1, 2))
    assert not np.array_equal(first, second)
