"""Masks of a bit a weight: as `np.packbits` has them, of the flattened mask, row-major."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dop_fast.kernels.bits import cpu, reference
from dop_fast.kernels.lists import in_place, memory_order

__all__ = ["apply_", "check", "count", "in_memory_order", "pack", "reference", "unpack"]


def pack(mask: Tensor) -> Tensor:
    """Return bool[...] as uint8[(n + 7) // 8]; the bits after the last are zero."""
    if mask.is_cuda:
        return reference.pack(mask)
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask that `pack` was given, bool[shape]."""
    size = torch.Size(shape)
    if packed.is_cuda:
        return reference.unpack(packed, shape)
    bits = np.unpackbits(packed.numpy(), count=size.numel()).view(np.bool_)
    return torch.from_numpy(bits).reshape(size)


def count(packed: Sequence[Tensor]) -> list[int]:
    """Return how many weights each mask keeps."""
    return [int(np.bitwise_count(part.cpu().numpy()).sum(dtype=np.int64)) for part in packed]


def apply_(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Set the weights whose bit is 0 to exactly 0.0, in place, also where they are NaN.

    Weights are dense, in any memory layout; a mask is on its weight's device. Bits are put into
    the order of the memory first where that is another, which takes longer than the rest.
    """
    check(weights, packed)
    pairs = [pair for pair in zip(weights, packed, strict=True) if pair[0].numel()]
    if not pairs:
        return
    flat = [in_place(weight) for weight, _ in pairs]
    packed = [in_memory_order(part, weight) for weight, part in pairs]
    if any(weight.dtype != torch.float32 for weight in flat):
        reference.apply_(flat, packed)
    elif flat[0].is_cuda:
        from dop_fast.kernels.bits import gpu

        gpu.apply_(flat, packed)
    else:
        cpu.apply_(flat, packed)


def check(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Refuse what would make compiled code leave its arrays."""
    for weight, part in zip(weights, packed, strict=True):
        if part.dtype != torch.uint8 or part.shape != ((weight.numel() + 7) // 8,):
            raise ValueError(f"bits {part.dtype}{list(part.shape)} for {list(weight.shape)}")
        if part.device != weight.device or not part.is_contiguous():
            raise ValueError(f"contiguous bits on {weight.device} are needed, not {part.device}")


def in_memory_order(packed: Tensor, weight: Tensor) -> Tensor:
    """Return the bits in the order in which the weight lies in memory."""
    if weight.is_contiguous():
        return packed
    return pack(unpack(packed, weight.shape).permute(memory_order(weight)))
