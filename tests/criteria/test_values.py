"""Scores against numbers worked out by hand and derivatives made in other ways."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from small_networks import Batches, attention, chunks, near, plain, residual, score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, masks
from dop_fast.models import build, prunable


def test_random_scores_depend_on_seed_and_layer_and_are_uniform() -> None:
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    module = criteria.load("random")
    first, second = module.score(model, (), cross_entropy, 1).values()
    assert not torch.equal(first, module.score(model, (), cross_entropy, 2)["0.weight"])
    assert not torch.equal(first.flatten(), second.flatten())
    # Kolmogorov and Smirnov: 20,000 uniform draws stay within 0.0138 with probability 0.999
    draws = first.flatten().sort().values.double()
    assert (draws - torch.linspace(0, 1, len(draws), dtype=torch.float64)).abs().max() < 0.0138


def test_magnitude_is_the_absolute_weight() -> None:
    model = plain()
    near(
        score("magnitude", model, ()), {n: w.detach().abs() for n, w in prunable(model).items()}, 0
    )


# --- numbers by hand: y = w1 x1 + w2 x2, L = mean of (y - t)^2 / 2 over the samples
#     x = (1, 1) with t = 4 and x = (0, 1) with t = 1, at w = (3, -1): both residuals are -2
#     g  = 1/2 (r1, r1 + r2)                 = (-1, -2)
#     H  = 1/2 [[1, 1], [1, 2]];         H g = (-1.5, -2.5)
#     |g w| = (3, 2)       w Hg = (-4.5, 2.5)       |w| = (3, 1)
def halved_square(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits[:, 0] - targets).square().mean() / 2


def quadratic(w1: float = 3.0, w2: float = -1.0) -> tuple[nn.Module, Batches]:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[w1, w2]]))
    return model, [(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([4.0, 1.0]))]


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [("snip", {}, (3, 2)), ("grasp", {"temperature": 1.0}, (-4.5, 2.5)), ("magnitude", {}, (3, 1))],
)
def test_scores_of_a_quadratic_are_those_worked_out_by_hand(
    name: str, knobs: dict[str, float], expected: tuple[float, float]
) -> None:
    model, batches = quadratic()
    scores: Any = criteria.load(name).score(model, batches, halved_square, 0, **knobs)
    assert scores["weight"].tolist() == [list(expected)]


def test_grasp_removes_first_the_weight_whose_loss_leaves_the_most_gradient_flow() -> None:
    def flow(w1: float, w2: float) -> float:
        r1, r2 = w1 + w2 - 4, w2 - 1
        return (r1 / 2) ** 2 + ((r1 + r2) / 2) ** 2

    # without w1, with both, without w2
    assert (flow(0, -1), flow(3, -1), flow(3, 0)) == (18.5, 5.0, 1.25)
    model, batches = quadratic()
    grasp: Any = criteria.load("grasp")
    scores = grasp.score(model, batches, halved_square, 0, temperature=1.0)
    assert masks.keep_top(scores, 0.5).masks["weight"].tolist() == [[False, True]]
    snip = criteria.load("snip").score(model, batches, halved_square, 0)
    assert masks.keep_top(snip, 0.5).masks["weight"].tolist() == [[True, False]]


def test_the_default_temperature_is_200() -> None:
    model, (batch,) = plain().double(), chunks(8, dtype=torch.float64)
    grasp = criteria.load("grasp")
    cooled = grasp.score(model, [batch], lambda z, y: cross_entropy(z * 200, y), 0)
    near(cooled, score("grasp", model, [batch], temperature=1.0), 1e-9)


# --- float64 oracles
def test_grasp_is_the_explicit_hessian_times_the_gradient() -> None:
    model = plain()
    images, labels = chunks(9, dtype=torch.float64)[0]
    exact = deepcopy(model).double().eval()
    weights = {name: weight.detach() for name, weight in prunable(exact).items()}
    sizes = [weight.numel() for weight in weights.values()]

    def loss(theta: Tensor) -> Tensor:
        parts = zip(weights.items(), theta.split(sizes), strict=True)
        shaped = {name: part.reshape(weight.shape) for (name, weight), part in parts}
        return cross_entropy(torch.func.functional_call(exact, shaped, (images,)) / 200, labels)

    theta = torch.cat([weight.flatten() for weight in weights.values()])
    product = theta * (
        torch.func.jacrev(torch.func.grad(loss))(theta) @ torch.func.grad(loss)(theta)
    )
    parts = zip(weights.items(), product.split(sizes), strict=True)
    expected = {name: part.reshape(weight.shape) for (name, weight), part in parts}
    near(score("grasp", model, chunks(4, 3, 2)), expected, 1e-4)


def published(model: nn.Module, batches: Batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return -theta * Hg and |theta * g| in float64 as published, but chunks count by size."""
    copy = deepcopy(model).double().train()
    weights = {name: w for name, w in prunable(copy).items() if name != "unused.weight"}
    size = sum(len(labels) for _, labels in batches)

    def slopes(batch: tuple[Tensor, Tensor], temperature: float) -> list[Tensor]:
        loss = cross_entropy(copy(batch[0].double()) / temperature, batch[1])
        share = loss * len(batch[1]) / size
        return list(torch.autograd.grad(share, list(weights.values()), create_graph=True))

    flow = [sum(parts).detach() for parts in zip(*(slopes(b, 200) for b in batches), strict=True)]
    for batch in batches:
        sum((f * g).sum() for f, g in zip(flow, slopes(batch, 200), strict=True)).backward()
    g = [sum(parts).detach() for parts in zip(*(slopes(b, 1) for b in batches), strict=True)]
    removal = {name: -weight.detach() * weight.grad for name, weight in weights.items()}
    pairs = zip(weights.items(), g, strict=True)
    return removal, {name: (weight.detach() * slope).abs() for (name, weight), slope in pairs}


def test_a_batch_norm_net_scores_as_in_the_published_codes() -> None:
    model, batches = residual(), chunks(8, 8, 5)
    removal, sensitivity = published(model, batches)
    snip, grasp = score("snip", model, batches), score("grasp", model, batches)
    assert not snip.pop("unused.weight").any()
    assert not grasp.pop("unused.weight").any()
    near(snip, sensitivity, 1e-4)
    near(grasp, {name: -value for name, value in removal.items()}, 1e-3)
    # the published rule: of all weights, those with the largest -theta * Hg go
    values = torch.cat([value.flatten() for value in removal.values()])
    gone = values.argsort(descending=True)[: len(values) // 2]
    kept = torch.cat([mask.flatten() for mask in masks.keep_top(grasp, 0.5).masks.values()])
    assert not kept[gone].any()


@pytest.mark.parametrize("name", ["grasp", "snip"])
@pytest.mark.parametrize("make", [plain, residual, attention])
def test_float32_scores_are_those_of_float64(name: str, make: Any) -> None:
    exact = score(name, make().double(), chunks(8, 5, dtype=torch.float64))
    near(score(name, make(), chunks(8, 5)), exact, 1e-3)


def test_grasp_keeps_the_gradient_flow_that_its_opposite_and_random_masks_lose() -> None:
    def flow(scores: dict[str, Tensor]) -> float:
        model = build("resnet20", 3, 0)
        kept = masks.keep_top(scores, 0.95)
        masks.apply_(model, kept)
        other = [(torch.randn(40, 3, 16, 16, generator=drawn), torch.arange(40) % 3)]
        found = engine.gradients(model, other, cross_entropy)
        return sum(float((found[name] * kept.masks[name]).square().sum()) for name in found)

    drawn = torch.Generator().manual_seed(1)
    scored = [(torch.randn(40, 3, 16, 16, generator=drawn), torch.arange(40) % 3)]
    model = build("resnet20", 3, 0)
    grasp = criteria.load("grasp").score(model, scored, cross_entropy, 0)
    opposite = {name: -score for name, score in grasp.items()}
    lots = criteria.load("random").score(model, (), cross_entropy, 0)
    assert flow(grasp) > 5 * flow(lots)
    assert flow(grasp) > 5 * flow(opposite)
