"""The k best scores: those of a stable sort, on any device, in any memory."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dop_fast.kernels import bits, lists, select

Top = Callable[[Sequence[Tensor], int], list[Tensor]]


def by_gpu(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Run the Triton passes, on a GPU or interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from dop_fast.kernels.select import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_passes", gpu.Passes)
        device = "cpu" if interpreted else "cuda"
        return [part.cpu() for part in select.top([score.to(device) for score in scores], k)]


twins = pytest.mark.parametrize(
    "top", [select.top, select.reference.top, by_gpu], ids=["cpu", "reference", "gpu"]
)


def sorting_twin(scores: Sequence[Tensor], k: int) -> list[list[bool]]:
    """Return what the first k of a stable sort, largest first, are."""
    values = torch.cat([score.double().flatten() for score in scores])
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[values.sort(stable=True, descending=True).indices[:k]] = True
    return [part.tolist() for part in kept.split([score.numel() for score in scores])]


def unpacked(packed: Sequence[Tensor], scores: Sequence[Tensor]) -> list[list[bool]]:
    return [
        bits.unpack(part, (score.numel(),)).tolist()
        for part, score in zip(packed, scores, strict=True)
    ]


def layers(seed: int = 0) -> list[Tensor]:
    """Return layers of all kinds: ordinary, tiny, ragged, empty, of few values, extreme."""
    drawn = torch.Generator().manual_seed(seed)
    few = torch.randint(-3, 3, (3, 500), generator=drawn) / 2
    extreme = [0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1.0]
    return [
        torch.randn(4500, generator=drawn) * torch.randn(4500, generator=drawn),
        torch.tensor(0.25),
        torch.zeros(0, 3),
        few,
        torch.tensor(extreme),
        torch.randn(5, 3, 3, 3, generator=drawn).to(memory_format=torch.channels_last),
        torch.randn(9, 7, generator=drawn).t(),
        torch.zeros(130),
        torch.randn(2, 20, generator=drawn)[:, ::3],
    ]


TOTAL = sum(layer.numel() for layer in layers())


@twins
@pytest.mark.parametrize("k", [1, 2, 7, 600, 2500, TOTAL - 2000, TOTAL - 1, TOTAL])
def test_the_best_are_the_first_of_a_stable_sort(top: Top, k: int) -> None:
    scores = layers()
    assert unpacked(top(scores, k), scores) == sorting_twin(scores, k)


@twins
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7.5, torch.inf, -torch.inf])
def test_equal_scores_stay_from_the_front(top: Top, value: float) -> None:
    scores = [torch.full((n,), value) for n in (3, 4100, 0, 1, 9000)]
    for k in (1, 3, 4103, 4104, 9000):
        kept = [bit for layer in unpacked(top(scores, k), scores) for bit in layer]
        assert kept == [True] * k + [False] * (len(kept) - k)


@twins
def test_zeros_of_either_sign_are_equal(top: Top) -> None:
    scores = [torch.tensor([-1e-45, -0.0, 0.0, -0.0]), torch.tensor([0.0, 1e-45])]
    assert unpacked(top(scores, 3), scores) == [[False, True, True, False], [False, True]]


single = st.floats(allow_nan=False, width=32)


@given(
    values=st.lists(
        st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1e-45, 1.0]) | single, max_size=20),
        min_size=1, max_size=5,
    ).filter(any),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(deadline=None)
def test_any_scores_are_ranked_as_a_stable_sort_does(
    values: list[list[float]], share: float, seed: int
) -> None:
    scores = [torch.tensor(layer) for layer in values]
    k = max(1, round(share * sum(map(len, values))))
    expected = sorting_twin(scores, k)
    assert unpacked(select.top(scores, k), scores) == expected
    assert unpacked(select.reference.top(scores, k), scores) == expected


def test_the_mask_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PIECE", 64)
    scores = layers(1)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for k in (1, 700, 3000, TOTAL - 900):
            assert unpacked(select.top(scores, k), scores) == sorting_twin(scores, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_ranked_as_they_are(dtype: torch.dtype) -> None:
    near = torch.tensor([1.0, 1.0 + 2**-40, 1.0 + 2**-7, 1.0, 0.5], dtype=dtype)
    scores = [torch.randn(300).to(dtype), near, torch.randn(70)]
    for k in (1, 50, 100, 369):
        assert unpacked(select.top(scores, k), scores) == sorting_twin(scores, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_not_a_number_is_refused_by_layer_and_infinities_if_asked(
    dtype: torch.dtype, sign: int
) -> None:
    fine = torch.randn(50).to(dtype)
    nan, infinite = fine.clone(), fine.clone()
    nan[33], infinite[7] = sign * torch.nan, sign * torch.inf
    for k in (1, 100):
        with pytest.raises(select.UnorderedError) as refused:
            select.top([fine, infinite, nan, nan], k)
        assert refused.value.layer == 2
        with pytest.raises(select.UnorderedError) as refused:
            select.top([fine, infinite, nan], k, finite=True)
        assert refused.value.layer == 1
        assert sum(bits.count(select.top([fine, infinite, fine], k))) == k


def test_every_not_a_number_is_one() -> None:
    for pattern in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -1):
        score = torch.tensor([0, pattern], dtype=torch.int32).view(torch.float32)
        assert score[1].isnan()
        with pytest.raises(select.UnorderedError):
            select.top([score], 1)


def test_scores_that_need_a_gradient_are_ranked_too() -> None:
    scores = [torch.randn(9, requires_grad=True)]
    assert unpacked(select.top(scores, 4), scores) == sorting_twin(scores, 4)


@pytest.mark.parametrize("k", [-1, 0, 4])
def test_a_count_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="of 3 scores"):
        select.top([torch.zeros(3)], k)
    with pytest.raises(ValueError, match="of 0 scores"):
        select.top([], 1)
