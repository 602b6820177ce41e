"""SBP-SR: the network it scores and trains, and its scores, against float64 autograd."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18
from torchvision.models.resnet import Bottleneck, ResNet

from dop_fast import engine
from dop_fast.criteria import ntk_sap, prospr, sbp_sr
from dop_fast.errors import ModelError
from dop_fast.models import build, prunable

Batches = list[tuple[Tensor, Tensor]]


def small_bottlenecks() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(Bottleneck, [2, 1, 1, 1], num_classes=3, width_per_group=8)


def small_blocks() -> nn.Module:
    torch.manual_seed(0)
    return resnet18(num_classes=3)


def cifar_blocks() -> nn.Module:
    return build("resnet20", 3, 0)


MODELS = {cifar_blocks: 9, small_blocks: 8, small_bottlenecks: 5}


def chunks(*sizes: int, side: int = 8) -> Batches:
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, side, side, generator=drawn), torch.arange(n) % 3) for n in sizes]


def stable(model: nn.Module, x: Tensor, blocks: int) -> Tensor:
    """Return the outputs of the Stable ResNet of `model`, written from the formula."""
    x = model.bn1(model.conv1(x)).relu()
    stages = [model.layer1, model.layer2, model.layer3]
    if hasattr(model, "maxpool"):
        x, stages = model.maxpool(x), [*stages, model.layer4]
    for block in (block for stage in stages for block in stage):
        branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        if hasattr(block, "conv3"):
            branch = block.bn3(block.conv3(branch.relu()))
        shortcut = x if block.downsample is None else block.downsample(x)
        x = F.relu(shortcut + branch / blocks**0.5)
    head = model.fc if hasattr(model, "fc") else model.linear
    return head(x.mean((2, 3)))


@pytest.mark.parametrize("make", MODELS)
def test_every_branch_is_divided_by_the_root_of_the_number_of_blocks(make: object) -> None:
    model = make().double()
    names = list(model.state_dict())
    images = chunks(4, side=32)[0][0].double()
    expected = stable(deepcopy(model), images, MODELS[make])
    scaled = sbp_sr.prepare(model)
    assert scaled is model and list(model.state_dict()) == names
    torch.testing.assert_close(model(images), expected)


def test_a_model_that_is_prepared_twice_is_scaled_once() -> None:
    images, _ = chunks(4)[0]
    once, twice = sbp_sr.prepare(cifar_blocks()), sbp_sr.prepare(sbp_sr.prepare(cifar_blocks()))
    assert torch.equal(once(images), twice(images))


def test_training_and_copies_keep_the_scaling() -> None:
    model = sbp_sr.prepare(cifar_blocks())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for images, labels in chunks(6, 6):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    plain = cifar_blocks()
    plain.load_state_dict(model.state_dict())
    images = chunks(5)[0][0]
    for network in (model, deepcopy(model)):
        torch.testing.assert_close(
            network.eval()(images), stable(deepcopy(plain).eval(), images, 9)
        )
    assert not torch.allclose(model(images), plain.eval()(images))


def sensitivity(model: nn.Module, batches: Batches, shares: list[float]) -> dict[str, Tensor]:
    """Return |theta * sum over chunks of share * g| in float64."""
    exact = deepcopy(model).double().train()
    blocks = 9
    weights = prunable(exact)
    losses = [
        share * cross_entropy(stable(exact, images.double(), blocks), labels)
        for share, (images, labels) in zip(shares, batches, strict=True)
    ]
    g = torch.autograd.grad(sum(losses), list(weights.values()))
    pairs = zip(weights.items(), g, strict=True)
    return {name: (weight.detach() * slope).abs() for (name, weight), slope in pairs}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name].double() - value).abs().max()
        assert off <= 1e-3 * value.max(), name  # float32 through 20 layers


@pytest.mark.parametrize("prepared", [False, True])
def test_clean_is_the_sensitivity_of_the_stable_network(prepared: bool) -> None:
    model, batches = cifar_blocks(), chunks(8, 4)
    if prepared:
        sbp_sr.prepare(model)
    expected = sensitivity(cifar_blocks(), batches, [8 / 12, 4 / 12])
    assert_near(sbp_sr.score(model, batches, cross_entropy, 0), expected)


def test_published_cuts_chunks_of_20_that_count_the_same() -> None:
    images, labels = chunks(25)[0]
    parts = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    expected = sensitivity(cifar_blocks(), parts, [1.0, 1.0])
    found = sbp_sr.score(cifar_blocks(), [(images, labels)], cross_entropy, 0, variant="published")
    factor = sum(expected[n].sum() for n in expected) / sum(found[n].sum() for n in found)
    assert_near({name: value * factor for name, value in found.items()}, expected)


def test_scoring_leaves_a_plain_model_plain() -> None:
    model, images = cifar_blocks(), chunks(5)[0][0]
    before = deepcopy(model)(images)
    sbp_sr.score(model, chunks(4), cross_entropy, 0)
    assert torch.equal(model(images), before)


def test_a_failing_loss_leaves_the_model_plain() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise KeyError("mine")

    model, images = cifar_blocks(), chunks(5)[0][0]
    before = deepcopy(model)(images)
    with pytest.raises(KeyError, match="mine"):
        sbp_sr.score(model, chunks(4), loss, 0)
    assert torch.equal(model(images), before)
    assert all(module.training for module in model.modules())


def test_a_network_without_residual_blocks_is_refused_before_anything_is_computed() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("computed")

    model = build("vgg19_cifar", 3, 0)
    for call in (lambda: sbp_sr.prepare(model), lambda: sbp_sr.score(model, chunks(4), loss, 0)):
        with pytest.raises(ModelError, match="no residual branches") as refused:
            call()
        assert "BasicBlock" in refused.value.hint


def test_other_criteria_score_a_prepared_network_as_it_is() -> None:
    batches = [(images.double(), labels) for images, labels in chunks(6)]
    model = sbp_sr.prepare(cifar_blocks().double())
    expected = sbp_sr.score(model, batches, cross_entropy, 0)
    assert_near(prospr.score(model, batches, cross_entropy, 0, steps=0), expected)
    knobs = {"image": (3, 8, 8), "draws": 1, "samples": 4}
    scaled = ntk_sap.score(model, (), cross_entropy, 0, **knobs)
    plain = ntk_sap.score(cifar_blocks().double(), (), cross_entropy, 0, **knobs)
    assert not torch.allclose(scaled["conv1.weight"], plain["conv1.weight"], rtol=1e-2)


def test_the_published_count_keeps_the_threshold_and_its_ties() -> None:
    scores = {"a": torch.tensor([5.0, 1, 2, 2]), "b": torch.tensor([3.0, 2, 0, 4, 9, 8])}
    # of 10 weights 3 go: 0, 1 and a 2, but the 2 stays, and with it the others
    assert sbp_sr.kept(scores, 0.7) == 8
    assert sbp_sr.kept(scores, 1.0) == 10


def test_second_derivatives_hold_for_the_scaled_network() -> None:
    model = sbp_sr.prepare(cifar_blocks().double())
    batches = [(images.double(), labels) for images, labels in chunks(6)]
    vector = {name: torch.randn_like(weight) for name, weight in prunable(model).items()}
    (found,) = engine.hessian_products(model, batches, cross_entropy, [vector])
    model.train()
    weights = list(prunable(model).values())
    g = torch.autograd.grad(
        cross_entropy(model(batches[0][0]), batches[0][1]), weights, create_graph=True
    )
    z = sum((v * slope).sum() for v, slope in zip(vector.values(), g, strict=True))
    expected = torch.autograd.grad(z, weights)
    for name, product in zip(found, expected, strict=True):
        torch.testing.assert_close(found[name], product, rtol=1e-7, atol=1e-9)
