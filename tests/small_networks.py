"""Small networks, samples and comparisons, for tests of criteria."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria

Batches = list[tuple[Tensor, Tensor]]


def plain() -> nn.Module:
    """Return a smooth conv net without batch norm, with dropout, for 3 x 6 x 6 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.5), nn.AvgPool2d(3),
        nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """A conv net with batch norm, a shortcut and a layer that the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(4)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.after(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Pixels as tokens: fused attention kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(2).transpose(1, 2))
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


def chunks(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batches:
    """Return the same samples in chunks of these sizes."""
    drawn = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 6, 6, generator=drawn, dtype=torch.float64)
    labels = torch.randint(3, (sum(sizes),), generator=drawn)
    parts = zip(images.to(dtype).split(list(sizes)), labels.split(list(sizes)), strict=True)
    return [(x.contiguous(), y) for x, y in parts]


def score(name: str, model: nn.Module, batches: Any, **knobs: Any) -> dict[str, Tensor]:
    function = criteria.load(name).score
    if "sparsity" in inspect.signature(function).parameters:
        knobs = {"sparsity": 0.6, **knobs}
    return function(model, batches, cross_entropy, 0, **knobs)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Fail unless every layer is off by at most `share` of its largest value.

    Shares above 1e-5 are for float32, which has seven digits and loses some to cancellation.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name].double() - value.double()).abs().max()
        assert off <= share * value.abs().max(), f"{name} is off by {off}"
