"""Published variants against the authors' rules, written out slowly in float64."""

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from small_networks import Batches, chunks, near, plain, residual, score
from torch import Tensor, nn
from torch.nn import functional as F

from dop_fast import criteria, pruning
from dop_fast.criteria import grasp, snip
from dop_fast.criteria._networks import redrawn
from dop_fast.masks import keep_top
from dop_fast.models import prunable

Weights = dict[str, Tensor]


def flat(values: Weights) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def relative(scores: Weights) -> Weights:
    """Return scores over the sum of their sizes: published ones differ by a positive constant."""
    size = flat(scores).double().abs().sum()
    return {name: value.double() / size for name, value in scores.items()}


def slopes(loss: Tensor, model: nn.Module, **how: Any) -> list[Tensor]:
    weights = list(prunable(model).values())
    return list(torch.autograd.grad(loss, weights, materialize_grads=True, **how))


def exact(make: Any) -> nn.Module:
    """Return the network in float64, its running statistics moved, in training mode."""
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
    return model


def double(*sizes: int, **how: Any) -> Batches:
    return chunks(*sizes, dtype=torch.float64, **how)


def job(name: str, model: nn.Module, batches: Batches) -> pruning.Job:
    criterion = criteria.load(name, "published")
    return pruning.Job(criterion, model, batches, F.cross_entropy, 0, {"variant": "published"})


# --- SNIP
@pytest.mark.parametrize("make", [plain, residual])
def test_snip_scores_another_draw_by_running_statistics(make: Any) -> None:
    model, batches = exact(make), double(7, 4)
    drawn = redrawn(model, snip._drawn_names(model), snip._variance_scaling, 0).eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    g = slopes(F.cross_entropy(drawn(images), labels), drawn)
    expected = {
        name: (slope * weight).detach().abs()
        for slope, (name, weight) in zip(g, prunable(drawn).items(), strict=True)
    }
    found = score("snip", model, batches, variant="published")
    near(found, expected, 1e-9)
    assert not torch.allclose(flat(found), flat(score("snip", model, batches)))


def test_snip_draws_a_cut_normal_of_variance_one_over_fan_in_and_biases_too() -> None:
    model = nn.Sequential(nn.Conv2d(8, 300, 5), nn.BatchNorm2d(300))
    drawn = dict(
        redrawn(model, snip._drawn_names(model), snip._variance_scaling, 3).named_parameters()
    )
    for name, fan_in in (("0.weight", 200), ("0.bias", 300)):
        sizes = drawn[name].detach() * math.sqrt(fan_in)
        assert sizes.abs().max() <= 2 / 0.8796
        assert not torch.equal(drawn[name], dict(model.named_parameters())[name])
    # 60,000 draws: five standard errors of their deviation
    assert abs(float(drawn["0.weight"].detach().std()) * math.sqrt(200) - 1) < 5 / math.sqrt(
        120_000
    )
    assert torch.equal(drawn["1.weight"], torch.ones(300))


# --- GraSP
def published_removal(model: nn.Module, parts: Batches) -> Weights:
    """Return -theta * Hg over |sum|, of a network that is drawn anew already."""
    model.train()

    def loss(part: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(part[0]) / 200, part[1])

    model.zero_grad()
    g = [sum(each) for each in zip(*(slopes(loss(part), model) for part in parts), strict=True)]
    for part in parts:
        again = slopes(loss(part), model, create_graph=True)
        sum((a * b).sum() for a, b in zip(g, again, strict=True)).backward()
    weights = {n: w for n, w in prunable(model).items()}
    scores = {
        n: torch.zeros_like(w) if w.grad is None else -w.detach() * w.grad
        for n, w in weights.items()
    }
    norm = flat(scores).sum().abs() + 1e-10
    return {name: value / norm for name, value in scores.items()}


def published_grasp_mask(removal: Weights, ratio: float) -> Tensor:
    """Return what stays, by the lines of the code."""
    keep_ratio = 1 - ratio
    values = flat(removal)
    threshold, _ = torch.topk(values, int(len(values) * (1 - keep_ratio)), sorted=True)
    return values <= threshold[-1]


def linear_names(model: nn.Module) -> list[str]:
    return [f"{n}.weight" for n, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def two_heads() -> nn.Module:
    """Return a network with batch norm and two linear layers, for images of any size."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def small_and_halved() -> tuple[Batches, Batches]:
    batches = double(8, 5)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    by_class = [i for label in range(3) for i in range(13) if labels[i] == label]
    return batches, [(images[part], labels[part]) for part in (by_class[:6], by_class[6:])]


def large_and_in_twenties() -> tuple[Batches, Batches]:
    drawn = torch.Generator().manual_seed(1)
    images = torch.randn(45 + 7, 3, 4, 65, generator=drawn, dtype=torch.float64)
    labels = torch.randint(3, (45 + 7,), generator=drawn)
    cuts = [slice(0, 20), slice(20, 40), slice(40, 45), slice(45, 52)]
    batches = [(images[:45], labels[:45]), (images[45:], labels[45:])]
    return batches, [(images[cut], labels[cut]) for cut in cuts]


@pytest.mark.parametrize(
    ("cut", "first"),
    [(small_and_halved, 0), (large_and_in_twenties, -1)],
    ids=["cifar", "imagenet"],
)
def test_grasp_takes_the_path_of_the_images_size(cut: Any, first: int) -> None:
    model = two_heads().double()
    batches, parts = cut()
    drawn = redrawn(model, linear_names(model)[first:], grasp._xavier, 0)
    removal = published_removal(drawn, parts)
    found = score("grasp", model, batches, variant="published")
    near(relative(found), relative({name: -value for name, value in removal.items()}), 1e-8)
    kept = pruning.select(job("grasp", model, batches), pruning.Plan(0.25, 1, True), 1, None)
    expected = published_grasp_mask(removal, 0.75)
    assert torch.equal(flat(kept.masks), expected)
    total = len(expected)
    assert kept.kept == total - int(total * 0.75) + 1  # one too many


def test_grasp_draws_linear_layers_by_xavier() -> None:
    model = nn.Linear(200, 400)
    drawn = redrawn(model, ["weight"], grasp._xavier, 0).weight.detach()
    assert abs(float(drawn.std()) / math.sqrt(2 / 600) - 1) < 5 / math.sqrt(160_000)


# --- FORCE and Iterative SNIP
def published_rounds(
    model: nn.Module, batches: Batches, share: float, rounds: int, *, force: bool
) -> list[Tensor]:
    """Return what stays after each round, as the code of FORCE has it."""
    dense = {name: weight.detach().clone() for name, weight in prunable(model).items()}
    mask: Tensor | None = None
    found = []
    for step in range(rounds):
        net = deepcopy(model).train()
        if mask is not None:
            parts = mask.split([weight.numel() for weight in dense.values()])
            with torch.no_grad():
                for part, weight in zip(parts, prunable(net).values(), strict=True):
                    weight[~part.view_as(weight)] = 0
        each = [slopes(F.nll_loss(net(images), labels), net) for images, labels in batches]
        mean = torch.stack([torch.cat([g.flatten() for g in one]) for one in each]).mean(0)
        weights = flat(dense) if force else flat(prunable(net)).detach()
        saliency = (weights * mean).abs()
        if mask is not None and not force:
            saliency[~mask] = saliency.min()
        keep = math.exp((step + 1) * math.log(share) / rounds)
        threshold, _ = torch.topk(saliency, int(len(saliency) * keep), sorted=True)
        mask = saliency >= threshold[-1]
        found.append(mask)
    return found


@pytest.mark.parametrize("name", ["force", "iter-snip"])
@pytest.mark.parametrize("make", [plain, residual])
def test_force_and_iterative_snip_follow_the_published_rounds(
    name: str, make: Any, tmp_path: Any
) -> None:
    model, batches = exact(make).train(), double(8, 5, 2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the networks of the code have none
    expected = published_rounds(model, batches, 0.2, 4, force=name == "force")
    plan = pruning.Plan(0.2, 4, published=True)
    found = list(pruning.rounds(job(name, model, batches), plan, tmp_path / "m", {}))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(flat(mine.masks), theirs)
    weights = len(expected[0])
    assert [mask.kept for mask in found] == [int(weights * 0.2 ** (t / 4)) for t in (1, 2, 3, 4)]


def test_force_keeps_ties_with_the_last_and_rounds_down() -> None:
    scores = {"a": torch.tensor([5.0, 4, 3, 3, 3, 2, 1])}
    module: Any = criteria.load("force")
    assert [module.kept(scores, share) for share in (0.29, 0.42, 0.43, 0.99)] == [2, 2, 5, 6]
    assert module.kept(scores, 0.01) == 1


# --- SynFlow
def published_synflow(model: nn.Module) -> Weights:
    """Return |theta dR/dtheta| of the network in evaluation mode with all values positive."""
    net = deepcopy(model).eval()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.abs_()
    g = slopes(net(torch.ones(1, 3, 6, 6, dtype=torch.float64)).sum(), net)
    pairs = zip(g, prunable(net).items(), strict=True)
    return {name: (slope * weight).detach().abs() for slope, (name, weight) in pairs}


@pytest.mark.parametrize("make", [plain, residual])
def test_synflow_scores_the_network_of_absolute_values(make: Any) -> None:
    model = exact(make)
    found = score("synflow", model, double(2), variant="published")
    near(found, published_synflow(model), 1e-9)


def test_synflow_drops_ties_with_the_last() -> None:
    scores = {"a": torch.tensor([5.0, 4, 3, 3, 3, 2, 1])}
    module: Any = criteria.load("synflow")
    assert [module.kept(scores, share) for share in (0.9, 0.58, 0.57, 0.14)] == [7, 5, 2, 1]


@pytest.mark.parametrize("name", ["force", "grasp", "iter-snip", "snip", "synflow"])
def test_a_published_variant_still_keeps_exactly_what_is_asked(name: str) -> None:
    model, batches = residual(), chunks(8, 5)
    mask = pruning.select(job(name, model, batches), pruning.Plan(0.3), 1, None)
    assert mask.kept == round(0.3 * mask.total)
    assert mask.kept == keep_top(score(name, model, batches, variant="published"), 0.7).kept
