"""Agreement of scores and masks against simulation, and the fit against curves that are known."""

import numpy as np
import pytest
import torch
from scipy import stats

from dop_fast.masks import MaskSet
from dop_fast.sanity.agreement import agreement, overlap
from dop_fast.sanity.extrapolation import fit, needed
from dop_fast.types import Scores


def _layers(seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": (30, 4), "b": (7,), "c": (50, 3)}
    return {
        name: i + torch.randn(shape, generator=generator)
        for i, (name, shape) in enumerate(sizes.items())
    }


def test_what_layers_explain_is_what_shuffling_inside_layers_leaves() -> None:
    a, b = _layers(0), _layers(1)
    found = agreement(a, b, 0.8)
    flat = torch.cat([score.flatten() for score in a.values()]).double().numpy()
    rng, cosines, ranks = np.random.default_rng(0), [], []
    for _ in range(2000):
        other = np.concatenate([rng.permutation(score.numpy().ravel()) for score in b.values()])
        cosines.append(flat @ other / np.linalg.norm(flat) / np.linalg.norm(other))
        ranks.append(stats.spearmanr(flat, other).statistic)
    assert found.cosine_layers == pytest.approx(np.mean(cosines), abs=0.004)
    assert found.spearman_layers == pytest.approx(np.mean(ranks), abs=0.005)
    whole = torch.cat([score.flatten() for score in b.values()]).numpy()
    assert found.spearman == pytest.approx(stats.spearmanr(flat, whole).statistic)


def test_overlap_by_hand() -> None:
    a = MaskSet({"x": torch.tensor([1, 1, 0, 0]).bool(), "y": torch.tensor([1, 0]).bool()})
    b = MaskSet({"x": torch.tensor([1, 0, 0, 0]).bool(), "y": torch.tensor([1, 1]).bool()})
    found = overlap(a, b)
    assert found.jaccard == pytest.approx(2 / 4)
    assert found.chance == pytest.approx(1.5 / (6 - 1.5))  # 3 · 3 / 6 shared
    assert found.chance_layers == pytest.approx(1.5 / (6 - 1.5))  # 2·1/4 + 1·2/2 shared
    assert found.moved == pytest.approx(1 / 3)  # one of three goes from x to y


def test_the_chance_levels_of_jaccard_are_those_of_random_masks() -> None:
    rng, sizes = np.random.default_rng(0), {"a": 4000, "b": 1000}
    kept = ({"a": 200, "b": 400}, {"a": 300, "b": 300})

    def by_layer(counts: dict[str, int]) -> MaskSet:
        drawn = {name: rng.permutation(size) < counts[name] for name, size in sizes.items()}
        return MaskSet({name: torch.from_numpy(mask) for name, mask in drawn.items()})

    def anywhere() -> MaskSet:
        drawn = rng.permutation(5000) < 600
        return MaskSet({"a": torch.from_numpy(drawn[:4000]), "b": torch.from_numpy(drawn[4000:])})

    inside = [overlap(by_layer(kept[0]), by_layer(kept[1])) for _ in range(300)]
    assert np.mean([one.jaccard for one in inside]) == pytest.approx(
        inside[0].chance_layers, rel=0.01
    )
    free = [overlap(anywhere(), anywhere()) for _ in range(300)]
    assert np.mean([one.jaccard for one in free]) == pytest.approx(0.12 / 1.88, rel=0.02)
    assert free[0].chance == pytest.approx(0.12 / 1.88)


def test_the_fit_finds_c_and_says_when_the_model_does_not_hold() -> None:
    sizes = (100, 200, 400, 800)
    exact = {n: n / (n + 700) for n in sizes}
    assert fit(exact) == pytest.approx(700, rel=1e-4)
    found = needed([exact, {n: n / (n + 800) for n in sizes}], 0.9)
    assert 6300 < found.items < 7200
    assert (found.low, found.high) == pytest.approx((6300, 7200), rel=1e-3)
    assert not found.bad and not found.far and "extrapolated" in found.text()
    level = needed([dict.fromkeys(sizes, 0.5)], 0.9)  # more items do not help
    assert level.bad and "not to be trusted" in level.text()
    assert needed([{n: n / (n + 9000) for n in sizes}], 0.9).far
    assert "a guess, 101 times" in needed([{n: n / (n + 9000) for n in sizes}], 0.9).text()
    assert "nothing checks the model" in needed([{100: 0.5}], 0.9).text()
    assert "no signal" in needed([dict.fromkeys(sizes, -0.1)], 0.9).text()


def test_what_was_measured_is_not_extrapolated() -> None:
    found = needed([{100: 0.5, 200: 0.8, 400: 0.96, 800: 0.97}], 0.88)
    assert found.measured and found.items == pytest.approx(200 * 2**0.5)
    assert needed([{100: 0.95, 200: 0.97}], 0.9).items == 100
    assert not needed([{100: 0.95, 200: 0.8}], 0.9).measured  # it fell again
