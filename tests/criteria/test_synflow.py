"""SynFlow against the sum over all paths, and on networks whose sums leave float32."""

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from small_networks import Batches, residual, score
from torch import Tensor, nn

from dop_fast.errors import DataError, ModelError
from dop_fast.models import build, prunable

NONE: Batches = []


def chain(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def by_paths(weights: list[Tensor]) -> list[list[list[Fraction]]]:
    """Return each weight's share of all paths' strength, in rational numbers, path by path."""
    exact = [[[abs(Fraction(float(v))) for v in row] for row in weight] for weight in weights]
    shares = [[[Fraction(0) for _ in row] for row in layer] for layer in exact]
    total = Fraction(0)
    units = [len(exact[0][0]), *(len(layer) for layer in exact)]
    for path in itertools.product(*map(range, units)):
        steps = list(enumerate(itertools.pairwise(path)))
        strength = math.prod((exact[i][out][into] for i, (into, out) in steps), start=Fraction(1))
        total += strength
        for i, (into, out) in steps:
            shares[i][out][into] += strength
    return [[[share / total for share in row] for row in layer] for layer in shares]


def test_scores_are_the_shares_of_all_paths_and_rank_as_they_do() -> None:
    model = chain(4, 5, 3, 4, 2)
    found = list(score("synflow", model, NONE, image=(1, 2, 2)).values())
    exact = by_paths([weight.detach() for weight in prunable(model).values()])
    expected = [share for layer in exact for row in layer for share in row]
    flat = torch.cat([layer.flatten() for layer in found])
    torch.testing.assert_close(flat, torch.tensor(list(map(float, expected))), rtol=1e-6, atol=0)
    order = sorted(range(len(expected)), key=expected.__getitem__)
    assert flat.argsort().tolist() == order


def test_a_mask_cuts_paths() -> None:
    model = chain(4, 5, 3)
    mask = {name: torch.rand_like(weight) > 0.3 for name, weight in prunable(model).items()}
    found = list(score("synflow", model, NONE, image=(1, 2, 2), mask=mask).values())
    kept = [
        weight.detach() * m
        for weight, m in zip(prunable(model).values(), mask.values(), strict=True)
    ]
    for layer, exact in zip(found, by_paths(kept), strict=True):
        torch.testing.assert_close(layer, torch.tensor([[float(v) for v in row] for row in exact]))


def test_where_nothing_arrives_scores_are_zero() -> None:
    model = chain(4, 5, 3)
    none = {
        name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in prunable(model).items()
    }
    found = score("synflow", model, NONE, image=(1, 2, 2), mask=none)
    assert not any(layer.any() for layer in found.values())


@pytest.mark.parametrize("name", ["resnet152", "vgg19_cifar"])
def test_deep_networks_neither_overflow_nor_underflow(name: str) -> None:
    model = build(name, 10, 0)
    scores = score("synflow", model, NONE, image=(3, 64, 64))
    weights = prunable(model)
    # all that flows goes through the first layer, and through the last
    for layer in (next(iter(scores)), list(scores)[-1]):
        assert float(scores[layer].sum(dtype=torch.float64)) == pytest.approx(1, abs=1e-6)
    for layer, values in scores.items():
        assert values.isfinite().all()
        assert not values[weights[layer] != 0].eq(0).any(), layer


def test_as_published_a_deep_network_overflows_and_the_way_out_is_named() -> None:
    model = build("resnet101", 10, 0)
    with pytest.raises(ModelError, match=r"overflows torch\.float32") as refused:
        score("synflow", model, NONE, image=(3, 32, 32), variant="published")
    assert "--variant clean" in refused.value.hint


class Clipped(nn.Module):
    """Clips what is large and divides by the size of what it sees."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.between = nn.Sequential(*between)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.between(self.stem(images)).mean((2, 3)))


@pytest.mark.parametrize(
    "between",
    [
        (nn.ReLU6(),), (nn.Hardtanh(),), (nn.Tanh(),), (nn.GroupNorm(2, 6),),
        (nn.InstanceNorm2d(6, affine=True),), (nn.LayerNorm([4, 4], elementwise_affine=False),),
        (nn.BatchNorm2d(6), nn.ReLU()),
    ],
)  # fmt: skip
def test_layers_that_clip_or_divide_hide_no_flow(between: tuple[nn.Module, ...]) -> None:
    torch.manual_seed(0)
    model = Clipped(*between)
    with torch.no_grad():
        model.stem.weight.mul_(1e4)
    plain = Clipped(nn.ReLU())
    plain.load_state_dict(model.state_dict(), strict=False)
    found, linear = (score("synflow", net, NONE, image=(3, 6, 6)) for net in (model, plain))
    for name, layer in linear.items():
        # batch norm before training divides by sqrt(1 + 1e-5), all channels alike
        torch.testing.assert_close(found[name], layer, rtol=1e-5, atol=0)


def test_an_input_of_unknown_size_is_refused() -> None:
    with pytest.raises(DataError, match="size of an input"):
        score("synflow", residual(), NONE)
