"""NTK-SAP against float64 autograd by masks, with batch norm frozen the way the code does it."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dop_fast.criteria import ntk_sap
from dop_fast.errors import DataError
from dop_fast.models import build, prunable
from dop_fast.seeding import derive


class Residual(nn.Module):
    """A conv net with batch norm, a shortcut, and a norm whose scale and shift say something."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.after = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.norm.weight, 1, 0.3)
        nn.init.normal_(self.norm.bias, 0, 0.3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.after(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def without_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def by_masks(
    model: nn.Module, draws: list[ntk_sap.Draw], mask: dict[str, Tensor] | None, published: bool
) -> dict[str, Tensor]:
    """Return |d/dm of the mean of |f(Z; m theta) - f(Z; m (theta + 0.01 n))|^2|, m a leaf."""
    exact = deepcopy(model).double()
    names = prunable(exact)
    kept = {name: torch.ones_like(w) if mask is None else mask[name] for name, w in names.items()}
    leaves = {name: kept[name].double().detach().requires_grad_() for name in names}
    norms = [module for module in exact.modules() if isinstance(module, nn.BatchNorm2d)]
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for draw in draws:
        inputs = draw.inputs.double()
        first = {name: leaves[name] * draw.weights[name].double() for name in names}
        moved = {n: draw.weights[n].double() + 0.01 * draw.noise[n].double() for n in names}
        second = {name: leaves[name] * moved[name] for name in names}
        with torch.no_grad():
            for norm in norms:
                norm.momentum = 1.0
                if published:
                    norm.weight.fill_(1)
                    norm.bias.fill_(0)
            functional_call(exact.train(), first, (inputs,))
            if not published:  # torch keeps the unbiased variance
                _bias(norms, inputs)
        exact.eval()
        apart = functional_call(exact, first, (inputs,)) - functional_call(exact, second, (inputs,))
        distance = apart.norm(dim=-1).square().sum() / len(inputs)
        slopes = torch.autograd.grad(distance, list(leaves.values()))
        total = {n: total[n] + slope for n, slope in zip(leaves, slopes, strict=True)}
    return {name: (total[name] * (leaf != 0)).detach().abs() for name, leaf in leaves.items()}


def _bias(norms: list[nn.Module], inputs: Tensor) -> None:
    count = inputs.shape[0] * inputs.shape[2] * inputs.shape[3]  # no layer here has a stride
    for norm in norms:
        norm.running_var *= (count - 1) / count


def drawn(model: nn.Module, shape: tuple[int, ...], published: bool) -> list[ntk_sap.Draw]:
    seeds = [derive(7, "ntk-sap", index) for index in range(2)]
    return [ntk_sap.draw(model, shape, seed, published) for seed in seeds]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ntk_sap.VARIANTS)
@pytest.mark.parametrize("make", [residual, without_norm])
def test_scores_are_the_derivatives_by_the_mask(make: object, variant: str, masked: bool) -> None:
    model, mask = make(), None
    if masked:
        mask = {name: torch.rand(w.shape) < 0.5 for name, w in prunable(model).items()}
    draws = drawn(model, (6, 3, 6, 6), variant == "published")
    expected = by_masks(model, draws, mask, variant == "published")
    knobs = {"image": (3, 6, 6), "draws": 2, "samples": 6, "mask": mask, "variant": variant}
    exact = ntk_sap.score(deepcopy(model).double(), (), cross_entropy, 7, **knobs)
    found = ntk_sap.score(model, (), cross_entropy, 7, **knobs)
    assert found.keys() == exact.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(exact[name], value, rtol=0, atol=1e-9 * float(value.max()))
        # float32, of a difference of near outputs
        torch.testing.assert_close(
            found[name].double(), value, rtol=0, atol=2e-3 * float(value.max())
        )
        assert mask is None or not found[name][~mask[name]].any()


def test_clean_weights_are_those_of_the_layer_in_another_order() -> None:
    model = residual()
    first, second = drawn(model, (6, 3, 6, 6), published=False)
    for name, weight in prunable(model).items():
        values = weight.detach().flatten().sort().values
        assert torch.equal(first.weights[name].flatten().sort().values, values)
        assert not torch.equal(first.weights[name], weight)
        assert not torch.equal(first.weights[name], second.weights[name])
        assert not torch.equal(first.noise[name], second.noise[name])
    assert not torch.equal(first.inputs, second.inputs)


def test_published_weights_are_kaiming_normal_over_the_fan_in() -> None:
    model = build("resnet20", 10, 0)
    weights = drawn(model, (2, 3, 8, 8), published=True)[0].weights["layer3.2.conv2.weight"]
    assert weights.std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)  # of 36,864 draws
    assert abs(weights.mean()) < 4 * weights.std() / weights.numel() ** 0.5


def test_neither_data_nor_its_cut_matter_but_the_shape_does() -> None:
    model = residual()
    batches = [(torch.randn(n, 3, 6, 6), torch.zeros(n, dtype=torch.int64)) for n in (3, 2)]
    knobs = {"draws": 1, "samples": 4}
    named = ntk_sap.score(model, (), cross_entropy, 0, image=(3, 6, 6), **knobs)
    found = ntk_sap.score(model, batches, cross_entropy, 0, **knobs)
    wider = ntk_sap.score(model, (), cross_entropy, 0, image=(3, 6, 8), **knobs)
    assert all(torch.equal(named[name], found[name]) for name in named)
    assert not torch.equal(named["stem.weight"], wider["stem.weight"])
    with pytest.raises(DataError, match="size of an input"):
        ntk_sap.score(model, (), cross_entropy, 0)


def test_the_weights_in_place_do_not_matter_to_published() -> None:
    one, other = build("resnet20", 3, 0), build("resnet20", 3, 1)
    knobs = {"image": (3, 8, 8), "draws": 1, "samples": 4, "variant": "published"}
    first = ntk_sap.score(one, (), cross_entropy, 0, **knobs)
    second = ntk_sap.score(other, (), cross_entropy, 0, **knobs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_published_count_drops_the_threshold_and_its_ties() -> None:
    scores = {"a": torch.tensor([5.0, 1, 2, 2]), "b": torch.tensor([3.0, 2, 0, 4, 9, 8])}
    assert ntk_sap.kept(scores, 0.7) == 5  # 3 of 10 go: 0, 1 and a 2, and with it the others
    assert ntk_sap.kept(scores, 1.0) == 10
