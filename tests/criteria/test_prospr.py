"""ProsPr against float64 autograd through the unrolled steps of its training."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dop_fast import engine
from dop_fast.criteria import prospr, snip
from dop_fast.errors import DataError
from dop_fast.models import prunable

Batches = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """A conv net with batch norm, biases and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.after = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.after(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def chunks(*sizes: int) -> Batches:
    drawn = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, 6, 6, generator=drawn), torch.arange(n) % 3) for n in sizes]


def unrolled(
    model: nn.Module,
    turns: list[Batches],
    *,
    lr: float,
    momentum: float = 0.0,
    first_order: bool = False,
    detach_first: bool = False,
) -> dict[str, Tensor]:
    """Return |dL(theta_K) / dm| at m = 1: one graph from the masks through every step."""
    exact = deepcopy(model).double().train()
    values = {name: value.detach() for name, value in exact.named_parameters()}
    ones = {name: torch.ones_like(values[name], requires_grad=True) for name in prunable(exact)}
    theta = {name: v * ones[name] if name in ones else v.clone() for name, v in values.items()}
    theta = {name: v if v.requires_grad else v.requires_grad_() for name, v in theta.items()}

    def loss(batches: Batches) -> Tensor:
        size = sum(len(labels) for _, labels in batches)
        parts = []
        for images, labels in batches:
            buffers = {name: buffer.clone() for name, buffer in exact.named_buffers()}
            logits = functional_call(exact, {**theta, **buffers}, (images.double(),))
            parts.append(cross_entropy(logits, labels) * len(labels) / size)
        return sum(parts)

    velocity: dict[str, Tensor] = {}
    for step, batches in enumerate(turns[:-1]):
        found = torch.autograd.grad(
            loss(batches), list(theta.values()), create_graph=not first_order
        )
        slopes = dict(zip(theta, found, strict=True))
        if detach_first and step == 0:
            slopes = {name: slope.detach() for name, slope in slopes.items()}
        velocity = {
            name: slope + momentum * velocity[name] if velocity else slope
            for name, slope in slopes.items()
        }
        theta = {name: value - lr * velocity[name] for name, value in theta.items()}
    slopes = torch.autograd.grad(loss(turns[-1]), list(ones.values()))
    return {name: slope.abs() for name, slope in zip(ones, slopes, strict=True)}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name].double() - value).abs().max()
        assert off <= share * value.max(), f"{name} is off by {off / value.max()}"


def double(batches: Batches) -> Batches:
    return [(images.double(), labels) for images, labels in batches]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", [plain, residual])
def test_clean_is_the_gradient_through_steps_on_all_material(
    make: object, steps: int, momentum: float
) -> None:
    model, batches = make(), chunks(8, 5)
    knobs = {"lr": 0.5, "momentum": momentum}
    expected = unrolled(model, [batches] * (steps + 1), **knobs)
    exact = prospr.score(
        deepcopy(model).double(), double(batches), cross_entropy, 0, steps=steps, **knobs
    )
    assert_near(exact, expected, 1e-9)
    found = prospr.score(model, batches, cross_entropy, 0, steps=steps, **knobs)
    assert_near(found, expected, 2e-3)  # float32


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("new_data", [True, False])
def test_published_takes_chunks_in_turn_and_detaches_the_first_velocity(
    new_data: bool, momentum: float
) -> None:
    model, batches = residual().double(), double(chunks(8, 5, 6))
    order = [0, 1, 2, 0] if new_data else [0, 0, 0, 0]
    turns = [[batches[i]] for i in order]
    detach = momentum != 0
    expected = unrolled(model, turns, lr=0.5, momentum=momentum, detach_first=detach)
    knobs = {"lr": 0.5, "momentum": momentum, "new_data": new_data}
    found = prospr.score(model, batches, cross_entropy, 0, variant="published", **knobs)
    assert_near(found, expected, 1e-9)
    other = unrolled(model, turns, lr=0.5, momentum=momentum)
    with_first = all(torch.allclose(found[name], other[name], rtol=1e-3) for name in found)
    assert with_first is not detach


def test_first_order_leaves_the_curvature_out() -> None:
    model, batches = residual().double(), double(chunks(8, 5))
    expected = unrolled(model, [batches] * 4, lr=0.5, momentum=0.9, first_order=True)
    knobs = {"lr": 0.5, "momentum": 0.9}
    found = prospr.score(model, batches, cross_entropy, 0, first_order=True, **knobs)
    assert_near(found, expected, 1e-9)
    full = prospr.score(model, batches, cross_entropy, 0, **knobs)
    assert not torch.allclose(full["stem.weight"], found["stem.weight"], rtol=1e-2)


def test_without_a_step_it_is_snip() -> None:
    model, batches = residual().double(), double(chunks(8, 5))
    found = prospr.score(model, batches, cross_entropy, 0, steps=0)
    assert_near(found, snip.score(model, batches, cross_entropy, 0), 1e-12)


def test_by_hand_on_a_parabola() -> None:
    # L = (w x - t)^2 / 2 at x = 2, t = 1, w = 3: g = (w x - t) x = 10, H = x^2 = 4
    # w1 = 3 - 0.1 * 10 = 2, g1 = 6; back: 6 - 0.1 * 4 * 6 = 3.6; times w: 10.8
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 3.0)
    batches = [(torch.tensor([[2.0]]).double(), torch.tensor([1.0]).double())]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square().mean() / 2

    found = prospr.score(model, batches, loss, 0, steps=1)["weight"]
    assert found.item() == pytest.approx(10.8, rel=1e-12)


@pytest.mark.parametrize("variant", prospr.VARIANTS)
def test_no_material_is_refused(variant: str) -> None:
    with pytest.raises(DataError, match="no samples"):
        prospr.score(plain(), [], cross_entropy, 0, variant=variant)


def test_the_published_count_is_rounded_up() -> None:
    assert prospr.kept({"a": torch.zeros(7), "b": torch.zeros(4)}, 0.1) == 2


def test_engine_derivatives_by_any_parameter_are_those_of_autograd() -> None:
    model, batches = residual().double(), double(chunks(8))
    values = dict(model.named_parameters())
    vector = {name: torch.randn_like(value) for name, value in values.items()}
    found = engine.gradients(model, batches, cross_entropy, names=values)
    (product,) = engine.hessian_products(model, batches, cross_entropy, [vector])
    loss = cross_entropy(model(batches[0][0]), batches[0][1])
    g = torch.autograd.grad(loss, list(values.values()), create_graph=True)
    z = sum((v * slope).sum() for v, slope in zip(vector.values(), g, strict=True))
    hv = torch.autograd.grad(z, list(values.values()))
    for name, slope, bent in zip(values, g, hv, strict=True):
        torch.testing.assert_close(found[name], slope.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(product[name], bent, rtol=1e-9, atol=1e-12)
