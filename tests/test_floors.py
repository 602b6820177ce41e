"""A floor keeps its share of each layer, and the count of the whole mask stays exact."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dop_fast.errors import ConfigError, ModelError
from dop_fast.masks import keep_top


def sorting_twin(layers: list[list[float]], k: int, floors: list[int]) -> list[list[bool]]:
    """Return what stays, by sorting tuples: each layer's own best, then the best of the others."""
    order = sorted(
        (-value, layer, at)
        for layer, values in enumerate(layers)
        for at, value in enumerate(values)
    )
    sure = {
        place
        for layer, floor in enumerate(floors)
        for place in [place for place in order if place[1] == layer][:floor]
    }
    rest = [place for place in order if place not in sure][: k - len(sure)]
    kept = {(layer, at) for _, layer, at in (*sure, *rest)}
    return [[(i, at) in kept for at in range(len(layer))] for i, layer in enumerate(layers)]


@given(
    layers=st.lists(
        st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]) | st.floats(-9, 9), min_size=1, max_size=9),
        min_size=1, max_size=4,
    ),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    floor=st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    one=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_a_floor_keeps_each_layers_own_best_then_the_best_of_all(
    layers: list[list[float]], sparsity: float, floor: float, dtype: torch.dtype, one: bool
) -> None:
    scores = {str(i): torch.tensor(values, dtype=dtype) for i, values in enumerate(layers)}
    values = [score.tolist() for score in scores.values()]
    k = max(1, round(sum(map(len, values)) * (1 - sparsity)))
    protected = ("0",) if one else None
    floors = [
        math.ceil(Fraction(str(floor)) * len(part)) if i == 0 or not one else 0
        for i, part in enumerate(values)
    ]
    if sum(floors) > k:
        with pytest.raises(ConfigError, match=f"ask for {sum(floors)} weights.* leaves {k}"):
            keep_top(scores, sparsity, floor, protected)
        return
    found = keep_top(scores, sparsity, floor, protected)
    assert found.kept == k
    assert [mask.tolist() for mask in found.masks.values()] == sorting_twin(values, k, floors)


def test_a_layer_that_would_collapse_keeps_its_floor() -> None:
    scores = {"big": torch.arange(1000.0) + 10, "small": torch.zeros(2, 15)}
    assert not keep_top(scores, 0.9).masks["small"].any()
    kept = keep_top(scores, 0.9, 0.1)
    assert kept.kept == 103
    assert kept.masks["small"].flatten().tolist() == [True] * 3 + [False] * 27


def test_floors_that_leave_no_choice_keep_nothing_else() -> None:
    scores = {"a": torch.tensor([9.0, 8.0, 7.0, 6.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    kept = keep_top(scores, 0.5, 0.5)
    assert kept.masks["a"].tolist() == [True, True, False, False]
    assert kept.masks["b"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_floor_hides_no_score_that_is_no_number(wrong: float) -> None:
    scores = {"a": torch.zeros(4), "b": torch.tensor([0.0, wrong, 1.0, 2.0])}
    with pytest.raises(ModelError, match="score in b"):
        keep_top(scores, 0.5, 0.1, ("a",))


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan")])
def test_a_floor_out_of_range_is_refused(floor: float) -> None:
    with pytest.raises(ConfigError, match="min_layer_density"):
        keep_top({"a": torch.zeros(3)}, 0.5, floor)
