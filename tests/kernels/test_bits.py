"""Masks of a bit a weight: NumPy's order, whatever memory the weights lie in."""

import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dop_fast.kernels import bits

SHAPES = [(5, 3, 3, 3), (7,), (), (1, 1), (0, 4), (3, 0), (16, 8, 1, 1), (41, 101), (8,)]


def by_reference(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    bits.reference.apply_(weights, packed)


def by_gpu(weights: Sequence[Tensor], packed: Sequence[Tensor]) -> None:
    """Run the Triton kernel, on a GPU or interpreted, on what lies row-major."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from dop_fast.kernels.bits import gpu

    device = "cpu" if interpreted else "cuda"
    moved = [weight.to(device).contiguous().view(-1) for weight in weights]
    gpu.apply_(moved, [part.to(device) for part in packed])
    for weight, value in zip(weights, moved, strict=True):
        weight.copy_(value.view(weight.shape))


Apply = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
twins = pytest.mark.parametrize(
    "apply", [bits.apply_, by_reference, by_gpu], ids=["cpu", "reference", "gpu"]
)


def masks(seed: int = 0) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=drawn) < 0.3 for shape in SHAPES]


@pytest.mark.parametrize("of", [bits, bits.reference], ids=["fast", "reference"])
def test_packing_is_numpys_and_comes_back(of: type[bits]) -> None:
    for mask in masks():
        packed = of.pack(mask)
        assert packed.numpy().tolist() == np.packbits(mask.numpy().ravel()).tolist()
        assert torch.equal(of.unpack(packed, mask.shape), mask)
        assert of.unpack(packed, mask.shape).dtype == torch.bool


def test_a_mask_is_packed_row_by_row_whatever_its_memory() -> None:
    mask = masks()[7]
    assert torch.equal(bits.pack(mask.t().contiguous().t()), bits.pack(mask))
    assert not torch.equal(bits.pack(mask.t()), bits.pack(mask))


def test_counts_are_those_of_the_masks() -> None:
    made = masks()
    assert bits.count([bits.pack(mask) for mask in made]) == [int(mask.sum()) for mask in made]


@twins
def test_removed_weights_become_zero_and_the_others_stay(apply: Apply) -> None:
    made = masks()
    weights = [torch.randn(mask.shape) for mask in made]
    for weight in weights:
        weight.view(-1)[::5] = torch.nan
        weight.view(-1)[1::5] = -torch.inf
    expected = [torch.where(mask, weight, 0) for mask, weight in zip(made, weights, strict=True)]
    apply(weights, [bits.pack(mask) for mask in made])
    for mask, weight, value in zip(made, weights, expected, strict=True):
        assert torch.equal(weight.nan_to_num(7), value.nan_to_num(7))
        assert not weight[~mask].signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_may_lie_in_any_dense_memory(dtype: torch.dtype) -> None:
    mask = masks()[0]
    weight = torch.randn(mask.shape, dtype=dtype).to(memory_format=torch.channels_last)
    expected = torch.where(mask, weight, 0)
    parameter = torch.nn.Parameter(weight)
    bits.apply_([parameter], [bits.pack(mask)])
    assert torch.equal(parameter, expected)
    turned = torch.randn(101, 41, dtype=dtype).t()
    expected = torch.where(masks()[7], turned, 0)
    bits.apply_([turned], [bits.pack(masks()[7])])
    assert torch.equal(turned, expected)


def test_bits_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(9)
    for wrong in (torch.zeros(1, dtype=torch.uint8), torch.zeros(2), torch.zeros(9).bool()):
        with pytest.raises(ValueError, match=r"for \[9\]"):
            bits.apply_([weight], [wrong])
    with pytest.raises(ValueError, match="contiguous"):
        bits.apply_([weight], [torch.zeros(4, dtype=torch.uint8)[::2]])
    with pytest.raises(ValueError, match="dense"):
        bits.apply_([torch.zeros(18)[::2]], [torch.zeros(2, dtype=torch.uint8)])
