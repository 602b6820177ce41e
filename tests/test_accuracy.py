import math

import numpy as np
import pytest
import torch
from array_images import image_set
from torch import nn

from dop_fast import training
from dop_fast.config import DataConfig


class Fixed(nn.Module):
    """Answers by the first pixel of an image: row i of the logits for the value i."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_accuracy_is_that_counted_by_hand(batch_size: int) -> None:
    logits = torch.tensor(
        [
            [9.0, 5, 4, 3, 2, 1, 0],  # label 0: first
            [9.0, 5, 4, 3, 2, 1, 0],  # label 1: second
            [9.0, 5, 4, 3, 2, 1, 0],  # label 4: fifth
            [9.0, 5, 4, 3, 2, 1, 0],  # label 5: sixth
        ]
    )
    labels = np.array([0, 1, 4, 5])
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    plain = DataConfig(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = training.evaluate(
        Fixed(logits), image_set(pixels, labels), plain, torch.device("cpu"), batch_size
    )
    assert (found.top1, found.top5) == (0.25, 0.75)
    by_hand = [
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    assert found.loss == pytest.approx(sum(by_hand) / 4)
