"""Classifiers of every family are scored, pruned to the exact count and trained with their mask."""

import architectures
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, masks, models
from dop_fast.masks import MaskSet
from dop_fast.training import hold


def batch() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=drawn), torch.arange(4) % 3


def train(model: nn.Module, kept: MaskSet) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    hold(model, kept, optimizer)
    images, labels = batch()
    for _ in range(2):  # the second has momentum
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("name", architectures.NETWORKS)
def test_an_architecture_keeps_the_exact_count_and_its_removed_weights_stay_zero(name: str) -> None:
    torch.manual_seed(0)
    model = architectures.NETWORKS[name]().train()
    parameters = dict(model.named_parameters())
    wide = {name for name, value in parameters.items() if value.dim() > 1}
    matrices = {name for name in wide if name.endswith("weight")}  # the rest is tables and tokens
    assert set(models.prunable(model)) == matrices
    total = sum(parameters[name].numel() for name in matrices)

    before = models.fingerprint(model)
    kept = {}
    for criterion in ("snip", "grasp"):
        scores = criteria.load(criterion).score(model, [batch()], cross_entropy, 0)
        kept[criterion] = masks.keep_top(scores, 0.9)
        assert kept[criterion].kept == round(total * 0.1)
    assert models.fingerprint(model) == before

    masks.apply_(model, kept["grasp"])
    old = {layer: parameters[layer].detach().clone() for layer in matrices}
    train(model, kept["grasp"])
    for layer, mask in kept["grasp"].masks.items():
        assert not bool(parameters[layer][~mask].any())
    assert all(bool(value.isfinite().all()) for value in parameters.values())
    assert any(not torch.equal(parameters[layer], old[layer]) for layer in matrices)


def test_tied_weights_are_counted_once_and_stay_tied() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
    second.weight = first.weight
    model = nn.Sequential(
        nn.AvgPool2d(8), nn.Flatten(), first, nn.Tanh(), second, nn.Tanh(), nn.Linear(48, 3)
    )
    images, labels = batch()
    loss = cross_entropy(model(images), labels)
    (slope,) = torch.autograd.grad(loss, [first.weight])  # of both uses
    scores = criteria.load("snip").score(model, [(images, labels)], cross_entropy, 0)
    assert list(scores) == ["2.weight", "6.weight"]
    torch.testing.assert_close(scores["2.weight"], (slope * first.weight).abs())
    kept = masks.keep_top(scores, 0.5)
    assert kept.total == 48 * 48 + 3 * 48
    train(model, kept)
    assert second.weight is first.weight
    assert not bool(second.weight[~kept.masks["2.weight"]].any())
