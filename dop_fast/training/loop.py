"""SGD epoch by epoch, with the paper's recipe (Sec. 4.1)."""

import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dop_fast import models, ranks, runs, seeding
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.errors import ModelError
from dop_fast.images import ImageSet
from dop_fast.masks import MaskSet
from dop_fast.training.accuracy import Accuracy, measure
from dop_fast.training.board import Board
from dop_fast.training.checkpoint import Checkpoint, Saved, keep_epoch
from dop_fast.training.loader import Pixels, own_part, training_batches, training_order
from dop_fast.training.state import State
from dop_fast.training.step import Step
from dop_fast.types import Track, untracked

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
    training and validation, `sparsity` the share of prunable weights that the mask removes. The
    last three are of the running average of the weights, where there is one.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float
    top1: float
    top5: float
    images_per_s: float
    time_s: float
    sparsity: float
    ema_top1: float | None = None
    ema_top5: float | None = None
    ema_loss: float | None = None

    @property
    def best_top1(self) -> float:
        """Top-1 of the running average, where there is one: it is what epochs are compared by."""
        return self.top1 if self.ema_top1 is None else self.ema_top1


class Fitted(NamedTuple):
    """What a training comes to: all its epochs, and the names of images that it left out."""

    epochs: tuple[Epoch, ...]
    unreadable: tuple[str, ...]


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the rate at `step`, from 0, of `steps` in the whole training.

    It rises linearly in the warm-up. By steps it falls tenfold at each milestone, a share of all
    steps; as a cosine it falls from the end of the warm-up to zero.
    """
    warm = config.warmup * steps
    rise = min(1.0, (step + 1) / warm) if warm else 1.0
    if config.schedule == "cosine":
        gone = (step - warm) / (steps - warm) if step > warm else 0.0
        return config.lr * (1 + math.cos(math.pi * gone)) / 2 * rise
    falls = sum(step / steps >= milestone for milestone in config.milestones)
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
    track: Track = untracked,
) -> Generator[Epoch, None, Fitted]:
    """Train the model in place, on the device, and yield every epoch; iterate to the end.

    A training that was interrupted in `folder` goes on after its last epoch, on one CPU exactly
    as if it had not been interrupted; epochs of before are yielded again. Weights that `masks`
    removes are zero after every step, and so is their momentum. `about` is kept with the final
    weights, see `models.save_weights`; `track` sees every batch. Ranks share each batch, and the
    first one writes. Raises ModelError where the loss stops being finite, DataError where too many
    images are unreadable, StoreError where the folder holds another training or the disk is full,
    RankError where ranks come to different weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = _Trainer(model, data, config, masks, seed, device, track)
    checkpoint = Checkpoint(folder, _identity(data, config, masks, seed, about))
    saved = checkpoint.read()
    ranks.same(lambda: saved and saved.epochs, "the checkpoints")
    epochs = trainer.restore(saved)
    publish = _Publisher(folder, trainer.state, config, about)
    publish(epochs)
    yield from epochs
    while len(epochs) < config.epochs:
        epochs.append(trainer.epoch(len(epochs) + 1))
        rows = [_row(epoch) for epoch in epochs]
        saved = Saved(trainer.state.tensors(), rows, trainer.unreadable())
        ranks.same(partial(models.fingerprint, saved.tensors), "the weights")
        if ranks.here().first:
            checkpoint.save(saved)
        publish(epochs)
        yield epochs[-1]
    ranks.once(partial(models.save_weights, folder / runs.WEIGHTS, model, about))
    if config.ema:
        average = folder / runs.AVERAGE
        ranks.once(partial(models.save_tensors, average, trainer.state.averaged(), about))
    return Fitted(tuple(epochs), tuple(trainer.unreadable()))


class _Publisher:
    """Writes what follows from a checkpoint: a kill in between costs nothing. One rank does."""

    def __init__(
        self, folder: Path, state: State, config: TrainConfig, about: Mapping[str, str]
    ) -> None:
        self.folder, self.state, self.about = folder, state, about
        self.every = config.keep_every
        wanted = config.tensorboard and ranks.here().first
        self.board = Board(folder / runs.BOARD) if wanted else None

    def __call__(self, epochs: list[Epoch]) -> None:
        if not ranks.here().first:
            return
        rows = [_row(epoch) for epoch in epochs]
        runs.write_metrics(self.folder, rows)
        if self.board:
            self.board.write(rows)
        if epochs:
            weights = self.state.averaged() or self.state.model.state_dict()
            tops = [epoch.best_top1 for epoch in epochs]
            keep_epoch(self.folder, weights, tops, self.every, self.about)


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
        track: Track,
    ) -> None:
        self.data, self.config = data.config, config
        self.seed, self.device, self.track = seed, device, track
        self.train = Pixels(data.train, config.workers, device, track=track)
        self.val = Pixels(data.val, config.workers, device, track=track)
        step, average = Step(model, data.config, config, masks), None
        if config.ema:
            decay = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
            average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        self.state = State(model, step, average, masks)
        self.found_before: list[str] = []

    def restore(self, saved: Saved | None) -> list[Epoch]:
        """Go on from what is stored, and return its epochs."""
        if saved is None:
            return []
        self.state.fill(saved.tensors)
        self.found_before = saved.unreadable
        return [Epoch(**row) for row in saved.epochs]

    def unreadable(self) -> list[str]:
        """Return the names of images that cannot be read, as far as they are known to any rank."""
        for part in (self.train, self.val):
            part.agree()
        found = [
            part.images.names[index]
            for part in (self.train, self.val)
            for index in sorted(part.unreadable)
        ]
        return list(dict.fromkeys([*self.found_before, *found]))

    def epoch(self, number: int) -> Epoch:
        """Train for an epoch, from 1, and measure."""
        start, label = time.perf_counter(), f"epoch {number}/{self.config.epochs}"
        loss, lr, count = self._train(number, label)
        train_s = time.perf_counter() - start
        found = self._measure(self.state.model, f"{label}, validation")
        if not math.isfinite(found.loss):
            raise _diverged(found.loss, f"the end of epoch {number}", lr, number)
        averaged = {}
        if self.state.average:
            ema = self._measure(self.state.average.module, f"{label}, average")
            averaged = {"ema_top1": ema.top1, "ema_top5": ema.top5, "ema_loss": ema.loss}
        return Epoch(
            epoch=number,
            lr=lr,
            train_loss=loss,
            val_loss=found.loss,
            top1=found.top1,
            top5=found.top5,
            images_per_s=count / train_s,
            time_s=time.perf_counter() - start,
            sparsity=self.state.masks.sparsity if self.state.masks else 0.0,
            **averaged,
        )

    def _train(self, number: int, label: str) -> tuple[float, float, int]:
        """Return the epoch's mean loss, its last learning rate and how many images it saw."""
        config, state = self.config, self.state
        chunks = training_order(len(self.train.images), config.batch_size, self.seed, number)
        before, steps = (number - 1) * len(chunks), config.epochs * len(chunks)
        batches = training_batches(
            self.train, [own_part(chunk) for chunk in chunks], config.augment, self.seed, number,
            erasing=config.random_erasing, fill=self.data.mean,
        )  # fmt: skip
        losses: list[Tensor] = []
        rates: list[float] = []
        sizes: list[float] = []
        state.model.train()
        with _seeded(seeding.derive(self.seed, "train", number, ranks.here().rank), self.device):
            for pixels, labels in self.track(batches, label, len(chunks)):
                size = float(ranks.mean(torch.tensor(float(len(labels)))))
                if not size:  # nothing of it can be read
                    continue
                rates.append(learning_rate(config, before + len(rates), steps))
                sizes.append(size)
                losses.append(state.step(pixels, labels, rates[-1], len(labels) / size))
                if state.average:
                    state.average.update_parameters(state.model)
                if len(losses) % CHECK_STEPS == 1:
                    _check(losses, rates, number)
        _check(losses, rates, number)
        weights = torch.tensor(sizes, dtype=torch.float64)
        loss = float(ranks.mean(torch.stack(losses)).cpu().double() @ weights / weights.sum())
        for network in (state.model, state.average):
            if network is not None:
                ranks.level(network)
        return loss, rates[-1], round(sum(sizes) * ranks.here().count)

    def _measure(self, model: nn.Module, label: str) -> Accuracy:
        config = self.config
        return measure(model, self.val, self.data, config.batch_size, config.amp, label)


def _row(epoch: Epoch) -> dict[str, Any]:
    return {key: value for key, value in asdict(epoch).items() if value is not None}


def _check(losses: list[Tensor], rates: list[float], epoch: int) -> None:
    if not math.isfinite(float(ranks.mean(losses[-1]))):
        losses = list(ranks.mean(torch.stack(losses)))
        first = int((~torch.stack(losses).isfinite()).nonzero()[0])
        where = f"step {first + 1} of epoch {epoch}"
        raise _diverged(float(losses[first]), where, rates[first], epoch)


def _diverged(loss: float, where: str, lr: float, epoch: int) -> ModelError:
    kept = f"; what it was after epoch {epoch - 1} is kept until then" if epoch > 1 else ""
    return ModelError(
        f"the loss became {loss} at {where}, at a learning rate of {lr:g}",
        f"try --lr {lr / 10:g}, --warmup 0.05 or --amp off, with --force to start over{kept}",
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
        **{key: settings[key] for key in settings.keys() - runs.WITHOUT_EFFECT},
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
