"""Random masks whose layers' densities a rule sets, and masks dealt anew inside their layers."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import masks
from dop_fast.criteria import random_erk, smart_ratio
from dop_fast.errors import ConfigError
from dop_fast.masks import MaskSet
from dop_fast.models import build, prunable

SPARSITIES = (0.3, 0.6, 0.8, 0.9, 0.95)


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in prunable(model).items()}


def counts(mask_set: MaskSet) -> dict[str, int]:
    return {row.name: row.kept for row in mask_set.layers()}


def kept(module: Any, model: nn.Module, sparsity: float, seed: int = 0) -> MaskSet:
    return masks.keep_top(module.score(model, (), cross_entropy, seed), sparsity)


def filled(claims: dict[str, float], sizes: dict[str, int], goal: float) -> dict[str, float]:
    """Return min(size, t * claim * size), t by bisection so that they add up to the goal."""
    low, high = 0.0, 1e12
    for _ in range(200):
        t = (low + high) / 2
        total = sum(min(1.0, t * claims[name]) * sizes[name] for name in claims)
        low, high = (t, high) if total < goal else (low, t)
    return {name: min(1.0, low * claims[name]) * sizes[name] for name in claims}


def assert_rounded(found: dict[str, int], shares: dict[str, float]) -> None:
    """Fail unless counts are shares, rounded.

    Rounding moves the total by half a weight a layer at most, and so does the threshold that
    makes up for it, with rounding of its own; that is shared out in proportion.
    """
    for name, share in shares.items():
        slack = 0.5 + len(shares) * share / sum(shares.values())
        assert abs(found[name] - share) <= slack, name


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_layers_keep_their_share_up_to_rounding(sparsity: float) -> None:
    model = build("resnet20", 10, 0)
    claims, sizes = {}, {}
    for name, shape in shapes(model).items():
        claims[name], sizes[name] = sum(shape) / shape.numel(), shape.numel()
    mask = kept(random_erk, model, sparsity)
    goal = round((1 - sparsity) * sum(sizes.values()))
    assert mask.kept == goal
    assert_rounded(counts(mask), filled(claims, sizes, goal))


def test_erk_masks_are_nested() -> None:
    model = build("resnet20", 10, 0)
    denser, sparser = kept(random_erk, model, 0.8), kept(random_erk, model, 0.9)
    assert all(not (sparser.masks[name] & ~denser.masks[name]).any() for name in denser.masks)


def test_published_erk_draws_every_weight_by_itself() -> None:
    model = build("resnet20", 10, 0)
    sizes = {name: shape.numel() for name, shape in shapes(model).items()}
    claims = {name: sum(shape) / shape.numel() for name, shape in shapes(model).items()}
    share = filled(claims, sizes, 0.1 * sum(sizes.values()))
    found = []
    for seed in range(30):
        scores = random_erk.score(model, (), cross_entropy, seed, variant="published")
        found.append(random_erk.kept(scores, 0.1))
    # a sum of binomials: 30 draws of it, mean and deviation
    mean = torch.tensor(found).double().mean()
    deviation = sum(n * (share[k] / n) * (1 - share[k] / n) for k, n in sizes.items()) ** 0.5
    assert abs(mean - 0.1 * sum(sizes.values())) < 4 * deviation / 30**0.5
    assert deviation / 2 < torch.tensor(found).double().std() < 2 * deviation


@pytest.mark.parametrize(("name", "residual"), [("resnet20", True), ("vgg19_cifar", False)])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.98])
def test_smart_ratio_layers_keep_their_share(name: str, residual: bool, sparsity: float) -> None:
    model = build(name, 10, 0)
    sizes = {layer: shape.numel() for layer, shape in shapes(model).items()}
    claims = {}
    for i, (layer, shape) in enumerate(shapes(model).items()):
        k = len(sizes) - i
        if len(shape) == 4:
            claims[layer] = (k**2 + k) / (1 if residual else (i + 1) ** 2)
    (linear,) = sizes.keys() - claims.keys()
    goal = round((1 - sparsity) * sum(sizes.values()))
    scores = smart_ratio.score(model, (), cross_entropy, 0, sparsity=sparsity)
    mask = masks.keep_top(scores, sparsity)
    assert mask.kept == goal
    assert counts(mask)[linear] == round(0.3 * sizes[linear])
    assert_rounded(counts(mask), filled(claims, sizes, goal - round(0.3 * sizes[linear])))


def by_the_code(model: nn.Module, sparsity: float, residual: bool) -> list[int]:
    """Return the published code's counts, step by step."""
    layers = list(shapes(model).values())
    sizes = [shape.numel() for shape in layers]
    depth = len(layers)
    ratio = [float((depth - i) ** 2 + (depth - i)) for i in range(depth)]
    if not residual:
        ratio = [value / (i + 1) ** 2 for i, value in enumerate(ratio)]
    conv = [i for i in range(depth) if len(layers[i]) == 4]
    linear = sum(sizes[i] for i in range(depth) if i not in conv)
    test = sum(int(sizes[i] * ratio[i]) for i in conv)
    k = (int(sum(sizes) * (1 - sparsity)) - int(linear * 0.3)) / test
    for i in conv:
        ratio[i] *= k
    extra = 0
    for i in conv:
        if ratio[i] >= 1:
            extra += int((ratio[i] - 1) * sizes[i])
            ratio[i] = 1.0
        else:
            rest = int((1 - ratio[i]) * sizes[i])
            if rest >= extra:
                ratio[i] += extra / sizes[i]
                extra = 0
            else:
                extra -= rest
                ratio[i] = 1.0
        if extra == 0:
            break
    kept = []
    for i, size in enumerate(sizes):
        count = size if ratio[i] >= 1 else int(ratio[i] * size)
        kept.append(count if i in conv else int(0.3 * size))
    return kept


@pytest.mark.parametrize(("name", "residual"), [("resnet20", True), ("vgg19_cifar", False)])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_published_smart_ratio_keeps_what_the_code_keeps(
    name: str, residual: bool, sparsity: float
) -> None:
    model = build(name, 10, 0)
    expected = by_the_code(model, sparsity, residual)
    scores = smart_ratio.score(model, (), cross_entropy, 0, sparsity=sparsity, variant="published")
    total = sum(score.numel() for score in scores.values())
    count = smart_ratio.kept(scores, 1 - sparsity)
    assert count == sum(expected)
    found = masks.keep_top(scores, 1 - count / total)
    assert list(counts(found).values()) == expected
    exact = masks.keep_top(scores, sparsity)
    assert exact.kept == round((1 - sparsity) * total)


def test_smart_ratio_refuses_what_leaves_convolutions_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Flatten(), nn.Linear(10, 27))  # 30 and 270
    smart_ratio.score(model, (), cross_entropy, 0, sparsity=0.72)
    with pytest.raises(ConfigError, match=r"0\.73") as refused:  # 0.27 are the linear layer's
        smart_ratio.score(model, (), cross_entropy, 0, sparsity=0.73)
    assert "0.730" in refused.value.hint
    with pytest.raises(ConfigError, match="needs a sparsity"):
        smart_ratio.score(model, (), cross_entropy, 0, variant="published")


@pytest.mark.parametrize("module", [random_erk, smart_ratio])
def test_places_inside_a_layer_are_drawn_by_lot(module: Any) -> None:
    model = build("resnet20", 10, 0)
    layer = "layer3.1.conv1.weight"
    drawn = [kept(module, model, 0.6, seed).masks[layer].double().flatten() for seed in range(4)]
    density = drawn[0].mean()
    for a, b in combinations(drawn, 2):  # of other seeds, overlaps are those of chance
        chance, size = density**2, len(a)
        off = (a * b).mean() - chance
        assert abs(off) < 4 * density * (1 - density) / size**0.5
    halves = drawn[0].view(2, -1).mean(1)
    assert abs(halves[0] - halves[1]) < 4 * (4 * density * (1 - density) / size) ** 0.5


def masked() -> MaskSet:
    first: Tensor = torch.arange(1000).view(10, 100) < 300
    return MaskSet({"a": first, "b": torch.ones(7, dtype=torch.bool)}, {"criterion": "snip"})


def test_a_shuffled_mask_has_the_counts_of_its_layers_and_other_places() -> None:
    mask = masked()
    dealt = masks.shuffled(mask, 1)
    assert counts(dealt) == counts(mask) == {"a": 300, "b": 7}
    assert dealt.about == mask.about
    # 90 of 300 fall on kept places by chance, with a deviation of 6.6
    assert 60 < int((dealt.masks["a"] & mask.masks["a"]).sum()) < 120
    assert dealt.masks["a"].shape == mask.masks["a"].shape


def test_a_shuffle_depends_on_its_seed_alone() -> None:
    mask = masked()
    assert torch.equal(masks.shuffled(mask, 1).masks["a"], masks.shuffled(mask, 1).masks["a"])
    assert not torch.equal(masks.shuffled(mask, 1).masks["a"], masks.shuffled(mask, 2).masks["a"])
    turned = MaskSet(dict(reversed(mask.masks.items())))
    assert torch.equal(masks.shuffled(mask, 1).masks["a"], masks.shuffled(turned, 1).masks["a"])
