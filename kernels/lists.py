"""Lists of tensors taken as one: pieces for threads, and tables for a single launch on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

PIECE = 1 << 20
"""Elements of a piece: much work for a call, and several pieces to a thread."""
T = TypeVar("T")


class Piece(NamedTuple):
    """A stretch of a flattened tensor: which tensor, from which element on, and a view of it."""

    tensor: int
    start: int
    part: Tensor


def pieces(tensors: Sequence[Tensor]) -> Iterator[Piece]:
    """Yield all tensors, in order, in pieces that start at a multiple of 8.

    Pieces of a tensor that is not contiguous are whole rows of its first dimension, so that
    flattening one copies no more than the piece.
    """
    for index, tensor in enumerate(tensors):
        if not tensor.numel():
            continue
        rows = tensor.view(-1) if tensor.is_contiguous() else tensor
        size = tensor.numel() // len(rows)
        step = max(8, PIECE // size // 8 * 8)
        for first in range(0, len(rows), step):
            yield Piece(index, first * size, rows[first : first + step])


def spread(job: Callable[[Sequence[Piece]], T], work: Sequence[Piece]) -> list[T]:
    """Return what `job` makes of the pieces, dealt to as many threads as PyTorch has."""
    threads = max(1, min(torch.get_num_threads(), len(work)))
    if threads == 1:
        return [job(work)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, [work[first::threads] for first in range(threads)]))


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the permutation that makes a dense tensor contiguous, such as a channels-last one."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.ndim), key=lambda axis: -strides[axis]))


def in_place(tensor: Tensor) -> Tensor:
    """Return a dense tensor's memory, [n] and contiguous; ValueError where there are gaps."""
    turned = tensor.detach().permute(memory_order(tensor))
    if not turned.is_contiguous():
        raise ValueError(f"only dense tensors are written to, not strides {tensor.stride()}")
    return turned.view(-1)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the values in the order of `in_place(other)`, copied if they lie otherwise."""
    return tensor.detach().permute(memory_order(other)).contiguous().view(-1)


def addresses(*columns: Sequence[Tensor]) -> Tensor:
    """Return where the tensors start, int64[columns tensors], on the tensors' device."""
    table = torch.tensor([[tensor.data_ptr() for tensor in column] for column in columns])
    return table.to(columns[0][0].device, non_blocking=True)


def aligned(*columns: Sequence[Tensor]) -> bool:
    """Return whether 16 bytes at a time may be read from all tensors."""
    return not any(tensor.data_ptr() % 16 for column in columns for tensor in column)


@lru_cache(maxsize=32)
def blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return the tensor, first element and tensor's size of each block, int64[blocks 3]."""
    size = torch.tensor(sizes)
    count = (size + block - 1) // block
    owner = torch.repeat_interleave(count)
    before = torch.cumsum(count, 0) - count
    start = (torch.arange(len(owner)) - before[owner]) * block
    return torch.stack([owner, start, size[owner]], 1).to(device)
