"""SGD epoch by epoch, with the paper's recipe (Sec. 4.1)."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dop_fast import models, runs, seeding
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.errors import ModelError
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.training.accuracy import measure
from dop_fast.training.checkpoint import Checkpoint
from dop_fast.training.loader import Pixels, training_batches, training_order
from dop_fast.training.step import Step

CHECK_STEPS = 100  # a look at the loss waits for the device


@dataclass(frozen=True)
class TrainData:
    """What to train on, what to measure on, and how images enter the network."""

    train: ImageSet
    val: ImageSet
    config: DataConfig


@dataclass(frozen=True)
class Epoch:
    """One finished epoch, the first is 1; accuracies are shares of the validation images.

    `lr` is that of the last step, `images_per_s` the speed of training, `time_s` the time of
    training and validation.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float
    top1: float
    top5: float
    images_per_s: float
    time_s: float


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate at `step`, from 0, of `steps` in the whole training.

    It falls tenfold at each milestone, a share of the steps, and rises linearly in the warm-up.
    """
    falls = sum(step / steps >= milestone for milestone in config.milestones)
    rise = min(1.0, (step + 1) / (config.warmup * steps)) if config.warmup else 1.0
    return config.lr / 10.0**falls * rise


def fit(
    model: nn.Module,
    data: TrainData,
    config: TrainConfig,
    folder: Path,
    *,
    masks: MaskSet | None = None,
    seed: int,
    device: torch.device,
    about: Mapping[str, str],
) -> Iterator[Epoch]:
    """Train the model in place, on the device, and yield every epoch; iterate to the end.

    A training that was interrupted in `folder` goes on after its last epoch, on one CPU exactly
    as if it had not been interrupted; epochs of before are yielded again. Weights that `masks`
    removes are zero after every step, and so is their momentum. `about` is kept with the final
    weights, see `models.save_weights`. Raises ModelError where the loss stops being finite,
    StoreError where the folder holds another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = _Trainer(model, data, config, masks, seed, device)
    checkpoint = Checkpoint(folder, _identity(data, config, masks, seed, about))
    rows = checkpoint.restore(model, trainer.step.optimizer)
    runs.write_metrics(folder, rows)
    yield from (Epoch(**row) for row in rows)
    while len(rows) < config.epochs:
        record = trainer.epoch(len(rows) + 1)
        rows.append(asdict(record))
        checkpoint.save(model, trainer.step.optimizer, masks, rows)
        runs.write_metrics(folder, rows)
        yield record
    models.save_weights(folder / runs.WEIGHTS, model, about)


class _Trainer:
    """A model and all that an epoch needs."""

    def __init__(
        self,
        model: nn.Module,
        data: TrainData,
        config: TrainConfig,
        masks: MaskSet | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.data, self.config = model, data.config, config
        self.seed, self.device = seed, device
        self.train = Pixels(data.train, config.workers, device)
        self.val = Pixels(data.val, config.workers, device)
        self.step = Step(model, data.config, config, masks)

    def epoch(self, number: int) -> Epoch:
        """Train for an epoch, from 1, and measure."""
        config, start = self.config, time.perf_counter()
        chunks = training_order(len(self.train.images), config.batch_size, self.seed, number)
        before, steps = (number - 1) * len(chunks), config.epochs * len(chunks)
        batches = training_batches(self.train, chunks, config.augment, self.seed, number)
        losses: list[Tensor] = []
        self.model.train()
        with _seeded(seeding.derive(self.seed, "train", number), self.device):
            for at, (pixels, labels) in enumerate(batches):
                lr = learning_rate(config, before + at, steps)
                losses.append(self.step(pixels, labels, lr))
                if at % CHECK_STEPS == 0 or at == len(chunks) - 1:
                    _check(float(losses[-1]), number, lr)
        sizes = torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)
        loss = float(torch.stack(losses).cpu().double() @ sizes / sizes.sum())
        train_s = time.perf_counter() - start
        found = measure(self.model, self.val, self.data, config.batch_size, config.amp)
        _check(loss + found.loss, number, lr)
        return Epoch(
            epoch=number,
            lr=lr,
            train_loss=loss,
            val_loss=found.loss,
            top1=found.top1,
            top5=found.top5,
            images_per_s=float(sizes.sum()) / train_s,
            time_s=time.perf_counter() - start,
        )


def _check(loss: float, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise ModelError(
            f"the loss became {loss} in epoch {epoch}, at a learning rate of {lr:g}",
            f"try --lr {lr / 10:g} or --warmup 0.05, and --force to start over",
        )


def _identity(
    data: TrainData,
    config: TrainConfig,
    masks: MaskSet | None,
    seed: int,
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to be of this training."""
    settings = config.to_dict()
    return {
        **{key: settings[key] for key in settings.keys() - runs.SPEED_ONLY},
        "seed": seed,
        "mask": models.fingerprint(masks.masks) if masks else "",
        "data": [data.train.fingerprint, data.val.fingerprint, data.config.mean, data.config.std],
        "about": dict(about),
    }


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Give dropout, which draws from torch's global stream, a stream of its own."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
