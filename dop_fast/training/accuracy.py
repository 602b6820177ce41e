"""Top-1, top-5 and loss on a set of images."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import ranks
from dop_fast.config import DataConfig, TrainConfig
from dop_fast.images import ImageSet, normalise
from dop_fast.precision import autocast, training_type
from dop_fast.training.loader import Pixels, split


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of right answers, and the mean cross entropy.

    `top5` is of the min(5, classes) best answers.
    """

    top1: float
    top5: float
    loss: float


def evaluate(
    model: nn.Module,
    images: ImageSet,
    data: DataConfig,
    device: torch.device,
    batch_size: int = 256,
    amp: str = "auto",
) -> Accuracy:
    """Measure the model, which is moved to the device, in eval mode; its mode is restored."""
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return measure(model, Pixels(images, TrainConfig().workers, device), data, batch_size, amp)


def measure(
    model: nn.Module,
    pixels: Pixels,
    data: DataConfig,
    batch_size: int,
    amp: str,
    label: str = "validation",
) -> Accuracy:
    """Measure a model that is on the device of `pixels`, on the images that can be read.

    Ranks share the images. `label` is what `pixels.track` shows.
    """
    was_training = model.training
    model.eval()
    chunks = ranks.share(split(np.arange(len(pixels.images)), batch_size))
    dtype = training_type(pixels.device, amp)
    sums: list[Tensor] = []  # on the device: reading each would wait for it
    count = 0
    with torch.no_grad(), autocast(pixels.device, dtype):
        for index, part in pixels.track(pixels.batches(chunks), label, len(chunks)):
            logits = model(normalise(part, data.mean, data.std)).float()
            sums.append(_sums(logits, pixels.labels(index)))
            count += len(index)
    model.train(was_training)
    every = torch.stack(ranks.collect([part.cpu() for part in sums])).double()
    top1, top5, loss = (every.sum(0) / sum(ranks.gather(count))).tolist()
    return Accuracy(top1, top5, loss)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1])).indices
    right = best == labels[:, None]
    loss = cross_entropy(logits, labels, reduction="sum")
    return torch.stack([right[:, 0].sum().float(), right.sum().float(), loss])
