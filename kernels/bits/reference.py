"""Packed masks in plain PyTorch, on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """Return bool[...] as uint8[(n + 7) // 8], the first of each eight the highest bit."""
    bits = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that `pack` was given, bool[shape]."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> places) & 1
    size = torch.Size(shape)
    return bits.view(-1)[: size.numel()].view(size).bool()


def apply_(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Set the weights whose bit is 0 to exactly 0.0, in place, also where they are NaN."""
    for weight, part in zip(weights, packed, strict=True):
        weight.masked_fill_(~unpack(part, weight.shape), 0)
