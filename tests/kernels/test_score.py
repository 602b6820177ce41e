"""Scores of all layers in one pass: equal to float64, bit for bit where nothing is added up."""

import os
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from dop_fast.kernels import bits, lists, score
from dop_fast.kernels.score import Rule

SHAPES = [(5, 3, 3, 3), (7,), (), (1, 1), (41, 101), (16, 8, 1, 1), (4097,), (8,)]
Score = Callable[..., None]


def by_gpu(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    rule: Rule,
    masks: Sequence[Tensor] | None = None,
) -> None:
    """Run the Triton kernel, on a GPU or interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from dop_fast.kernels.score import gpu

    device = "cpu" if interpreted else "cuda"
    columns = [
        None if column is None else [part.to(device).reshape(-1) for part in column]
        for column in (out, weights, factors, masks)
    ]
    gpu.score_(columns[0], columns[1], columns[2], rule, columns[3])
    for part, value in zip(out, columns[0] or (), strict=True):
        part.copy_(value.view(part.shape))


twins = pytest.mark.parametrize(
    "by", [score.score_, score.reference.score_, by_gpu], ids=["cpu", "reference", "gpu"]
)


def made(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=drawn, dtype=dtype) for shape in SHAPES]


def exact(
    out: Tensor, weight: Tensor, factor: Tensor | None, rule: Rule, mask: Tensor | None
) -> Tensor:
    value = weight.double() if factor is None else weight.double() * factor.double()
    value = rule.scale * (value.abs() if rule.absolute else value)
    value = value if mask is None else torch.where(mask, value, 0)
    return value + out.double() if rule.add else value


@twins
@pytest.mark.parametrize("has_factor", [True, False], ids=["product", "alone"])
@pytest.mark.parametrize("has_mask", [True, False], ids=["masked", "whole"])
def test_scores_are_those_of_float64(by: Score, has_factor: bool, has_mask: bool) -> None:
    weights, factors = made(0), made(1) if has_factor else None
    kept = [part > 0.4 for part in made(2)] if has_mask else None
    masks = None if kept is None else [bits.pack(mask) for mask in kept]
    for absolute, add, scale in product((True, False), (True, False), (1.0, 0.3)):
        rule, out = Rule(absolute, add, scale), made(3)
        expected = [
            exact(out[i], weights[i], factors and factors[i], rule, kept and kept[i])
            for i in range(len(SHAPES))
        ]
        by(out, weights, factors, rule, masks)
        for found, value in zip(out, expected, strict=True):
            assert torch.allclose(found.double(), value, rtol=1e-6, atol=1e-6)


@twins
def test_without_a_sum_scores_are_eager_ones_to_the_bit(by: Score) -> None:
    weights, factors, out = made(0), made(1), made(3)
    by(out, weights, factors, Rule(True))
    for found, weight, factor in zip(out, weights, factors, strict=True):
        assert torch.equal(found, (weight * factor).abs())


@twins
def test_not_a_number_shows_and_a_removed_one_counts_as_zero(by: Score) -> None:
    weight = torch.tensor([torch.nan, torch.nan, -torch.inf, -torch.inf, 2.0, 2.0])
    mask = bits.pack(torch.tensor([True, False] * 3))
    out = [torch.ones(6)]
    by(out, [weight], [torch.ones(6)], Rule(True, True), [mask])
    assert out[0].nan_to_num(7, posinf=8).tolist() == [7, 1, 8, 1, 3, 1]


def test_layers_may_lie_in_any_memory() -> None:
    mask = [bits.pack(torch.randn(9, 5, 3, 3) > 0)]
    weight, factor = torch.randn(9, 5, 3, 3), torch.randn(9, 5, 3, 3)
    expected = torch.zeros(9, 5, 3, 3)
    score.reference.score_([expected], [weight], [factor], Rule(True), mask)
    turned = [x.to(memory_format=torch.channels_last) for x in (weight, factor)]
    strided = torch.randn(9, 5, 3, 6)[..., ::2].copy_(factor)
    for w, f in ((turned[0], turned[1]), (turned[0], factor), (weight, turned[1]),
                 (turned[0], strided), (strided.clone().copy_(weight), factor)):  # fmt: skip
        out = torch.empty_like(w)
        score.score_([out], [torch.nn.Parameter(w)], [f], Rule(True), mask)
        assert torch.equal(out, expected)


def test_chunks_add_up_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "PIECE", 64)
    weights, factors, masks = made(0), made(1), [bits.pack(part > 0) for part in made(2)]
    expected = [torch.zeros(shape) for shape in SHAPES]
    for share in (0.25, 0.75):
        score.reference.score_(expected, weights, factors, Rule(True, True, share), masks)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        out = [torch.zeros(shape) for shape in SHAPES]
        for share in (0.25, 0.75):
            score.score_(out, weights, factors, Rule(True, True, share), masks)
        for found, value in zip(out, expected, strict=True):
            assert torch.allclose(found, value, rtol=1e-6)


def test_double_precision_stays_double() -> None:
    weights, factors = made(0, torch.float64), made(1, torch.float64)
    out = [torch.zeros_like(weight) for weight in weights]
    score.score_(out, weights, factors, Rule(False))
    assert all(torch.equal(s, w * f) for s, w, f in zip(out, weights, factors, strict=True))


def test_empty_layers_and_no_layers_are_nothing_to_do() -> None:
    score.score_([], [], None, Rule(True))
    score.score_([torch.zeros(0, 3)], [torch.zeros(0, 3)], None, Rule(True))
    out = [torch.zeros(0, 3), torch.zeros(2)]
    score.score_(out, [torch.zeros(0, 3), torch.tensor([-1.0, 2])], None, Rule(True))
    assert out[1].tolist() == [1, 2]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        score.score_([torch.zeros(3)], [torch.zeros(4)], None, Rule(True))
    with pytest.raises(ValueError, match="dense"):
        score.score_([torch.zeros(6)[::2]], [torch.zeros(3)], None, Rule(True))
    with pytest.raises(ValueError, match=r"for \[3\]"):
        score.score_([torch.zeros(3)], [torch.zeros(3)], None, Rule(True), [torch.zeros(1)])
