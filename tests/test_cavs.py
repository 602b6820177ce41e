"""Separators against scikit-learn, TCAV against explicit vectors, gradients by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.model_selection import train_test_split
from torch import nn

from dop_fast.concepts import cavs
from dop_fast.concepts.activations import Probe, pool
from dop_fast.config import DataConfig
from dop_fast.errors import ModelError
from dop_fast.images import normalise

SETS, SIZE, WIDTH = 5, 12, 60
PLAIN = DataConfig(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
CPU = torch.device("cpu")


def rows(seed: int, *shape: int) -> torch.Tensor:
    """Return positive rows with a common part, as activations are."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()
    return (noise + 1 + torch.arange(shape[-1]) / shape[-1]).relu()


def pair(seed: int, apart: float = 0.3) -> np.ndarray:
    concept, other = rows(seed, SIZE, WIDTH), rows(seed + 100, SIZE, WIDTH)
    concept[:, :10] += apart
    return torch.cat([concept, other]).double().numpy()


def penalty_of(x: np.ndarray) -> float:
    return cavs.RIDGE * ((x - x.mean(0)) ** 2).sum() / len(x)


@pytest.mark.parametrize("seed", range(3))
def test_ridge_is_scikit_learns_ridge(seed: int) -> None:
    x, y = pair(seed), np.repeat([1.0, -1.0], SIZE)
    dual, _ = cavs.ridge((x @ x.T)[None])
    expected = Ridge(alpha=penalty_of(x), solver="svd").fit(x, y).coef_
    assert np.allclose(dual[0] @ x, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("apart", [0.0, 0.3, 3.0])
def test_ridge_accuracy_is_that_of_leaving_each_row_out(apart: float) -> None:
    x, y = pair(0, apart), np.repeat([1.0, -1.0], SIZE)
    _, accuracy = cavs.ridge((x @ x.T)[None])
    right = []
    for left_out in range(len(x)):
        others = np.arange(len(x)) != left_out
        model = Ridge(alpha=penalty_of(x), solver="svd").fit(x[others], y[others])
        right.append(model.predict(x[left_out : left_out + 1])[0] * y[left_out] > 0)
    assert accuracy[0] == np.mean(right)


def test_ridge_ignores_a_shift_of_all_rows() -> None:
    x = pair(0)
    plain, _ = cavs.ridge((x @ x.T)[None])
    moved, _ = cavs.ridge(((x + 5) @ (x + 5).T)[None])
    assert np.allclose(plain, moved)


def test_ridge_bears_rows_without_any_difference() -> None:
    for value in (0.0, 3.0):
        x = np.full((8, 5), value)
        dual, _ = cavs.ridge((x @ x.T)[None])
        assert np.allclose(dual @ x, 0)


@pytest.mark.parametrize("seed", range(3))
def test_sgd_in_the_span_of_the_rows_is_sgd_on_the_rows(seed: int) -> None:
    x, y = pair(seed, 0.6), np.repeat([1, 0], SIZE)
    dual, accuracy = cavs.sgd((x @ x.T)[None], seed)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=0.33, stratify=y, random_state=seed
    )
    published = SGDClassifier(alpha=0.01, max_iter=1000, tol=1e-3, random_state=seed)
    published.fit(x_train, y_train)
    assert np.allclose(dual[0] @ x, published.coef_[0], rtol=1e-5, atol=1e-6)
    assert accuracy[0] == published.score(x_test, y_test)


@pytest.mark.parametrize("cav", ["ridge", "sgd"])
@pytest.mark.parametrize("count", [7, SIZE, SIZE + 5])
def test_tcav_is_the_share_of_gradients_along_the_explicit_vector(cav: str, count: int) -> None:
    concept, sets = rows(1, count, WIDTH), rows(2, SETS, SIZE, WIDTH)
    concept[:, :10] += 0.5
    gradients = torch.from_numpy(np.random.default_rng(3).normal(size=(30, WIDTH))).float()
    runs, accuracy = cavs.tcav(concept, cavs.hold(sets, gradients), cav, 4)
    n, accuracies = min(count, SIZE), []
    for number, other in enumerate(sets):
        x = torch.cat([concept[:n], other[:n]]).double().numpy()
        separate = cavs.ridge if cav == "ridge" else lambda gram, at=number: cavs.sgd(gram, 4 + at)
        dual, one = separate((x @ x.T)[None])
        vector = dual[0] @ x
        assert (vector @ x[:n].T).mean() > (vector @ x[n:].T).mean()  # toward the concept
        assert runs[number] == (gradients.double().numpy() @ vector > 0).mean()
        accuracies.append(one[0])
    assert accuracy == pytest.approx(np.mean(accuracies))


def test_products_of_bfloat16_are_rounded_less_than_bfloat16() -> None:
    one, other = rows(0, 30, 9000).bfloat16(), rows(1, 20, 9000).bfloat16()
    exact = one.double().numpy() @ other.double().numpy().T
    by_torch = (one @ other.T).double().numpy()
    found = cavs.products(one, other)
    assert found.dtype == np.float64
    assert np.abs(found - exact).mean() < 0.5 * np.abs(by_torch - exact).mean()
    assert np.allclose(found, exact, rtol=2**-8)
    assert np.allclose(cavs.products(one.float(), other.float()), exact, rtol=1e-5)


def test_p_value_is_the_one_sided_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    for shift in (-0.2, 0.0, 0.1, 0.5):
        runs, null = rng.random(20) + shift, rng.random(20)
        expected = ttest_rel(runs, null, alternative="greater").pvalue
        assert cavs.p_value(runs, null) == pytest.approx(expected)


@pytest.mark.parametrize(("shift", "expected"), [(0.1, 0.0), (0.0, 1.0), (-0.1, 1.0)])
def test_p_value_of_a_constant_difference(shift: float, expected: float) -> None:
    null = np.array([0.1, 0.2, 0.3, 0.7])
    assert cavs.p_value(null + shift, null) == expected
    assert cavs.p_value(np.full(4, 0.5 + shift), np.full(4, 0.5)) == expected


class Toy(nn.Module):
    """Two channels, redness and greenness; class 0 looks at the first alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 2, 1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(2, 3)[..., None, None])
            self.head.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x) - 0.5).mean(dim=(2, 3)))


def photos(seed: int, count: int, red: int = 0, green: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 128, (count, 4, 4, 3))
    return (pixels + np.array([red, green, 0])).astype(np.uint8)


def entered(*batches: np.ndarray) -> list[torch.Tensor]:
    """Return pixels as they enter a network."""
    return [normalise(torch.from_numpy(pixels), PLAIN.mean, PLAIN.std) for pixels in batches]


def probe_of(model: nn.Module, layer: str, amp: str = "off") -> Probe:
    return Probe(model, layer, CPU, amp)


def maps_of(probe: Probe, *batches: np.ndarray) -> torch.Tensor:
    return torch.cat(list(probe.activations(entered(*batches)))).flatten(1)


def test_gradient_of_log_p_is_the_head_less_its_expectation() -> None:
    model, pixels = Toy(), photos(0, 6, 100, 100)
    found = probe_of(model, "act").gradients(entered(pixels[:4], pixels[4:]), 0, "logprob")
    with torch.no_grad():
        p = model(torch.from_numpy(pixels / 255).float().permute(0, 3, 1, 2)).softmax(1)
    weight = model.head.weight.detach()
    by_hand = (weight[0] - p @ weight) / 16
    assert torch.allclose(found.reshape(6, 2, 16), by_hand[..., None].expand(6, 2, 16), atol=1e-6)


def test_gradient_reaches_through_what_follows_the_layer() -> None:
    model, pixels = Toy(), photos(0, 5, 70, 70)
    found = probe_of(model, "body").gradients(entered(pixels), 2, "logit")
    x = torch.from_numpy(pixels / 255).float().permute(0, 3, 1, 2)
    on = (model.body(x) > 0.5).float()
    expected = on * model.head.weight[2].reshape(2, 1, 1) / 16
    assert 0 < on.mean() < 1
    assert torch.allclose(found, expected)


def test_the_logits_gradient_behind_a_linear_head_is_the_same_for_all_images() -> None:
    probe, pixels = probe_of(Toy(), "act"), entered(photos(0, 6, 100, 100))
    assert len(probe.gradients(pixels, 0, "logit").unique(dim=0)) == 1
    assert len(probe.gradients(pixels, 0, "logprob").unique(dim=0)) == 6


def test_maps_are_those_before_what_follows_works_in_place() -> None:
    pixels = photos(0, 3)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
    nn.init.constant_(model[0].bias, -1.0)
    maps = maps_of(probe_of(model, "0"), pixels[:1], pixels[1:])
    x = torch.from_numpy(pixels / 255).float().permute(0, 3, 1, 2)
    assert torch.allclose(maps, model[0](x).flatten(1), atol=1e-6)
    assert (maps < 0).any()


def test_pooling_takes_the_mean_over_space_or_tokens() -> None:
    maps = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(pool(maps), maps.flatten(2).mean(2))
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(pool(tokens), tokens.sum(1) / 4)
    assert torch.equal(pool(tokens[0]), tokens[0])


def test_the_teacher_stays_as_it_is() -> None:
    model = Toy().train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    probe = probe_of(model, "body")
    maps_of(probe, photos(0, 2))
    probe.gradients(entered(photos(0, 2)), 0, "logprob")
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.body._forward_hooks
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_a_layer_without_a_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.pair(x)[0].mean(dim=(2, 3)))

    with pytest.raises(ModelError, match="pair"):
        maps_of(probe_of(Outer(), "pair"), photos(0, 2))


@pytest.mark.parametrize("cav", ["ridge", "sgd"])
def test_the_concept_that_excites_the_class_has_tcav_one(cav: str) -> None:
    probe = probe_of(Toy(), "act")
    gradients = probe.gradients(entered(photos(1, 20, 100, 100)), 0, "logprob")
    sets = torch.stack([maps_of(probe, photos(10 + i, SIZE)) for i in range(SETS)])
    against = cavs.hold(sets, gradients.flatten(1))
    red, _ = cavs.tcav(maps_of(probe, photos(2, SIZE, red=120)), against, cav, 0)
    green, _ = cavs.tcav(maps_of(probe, photos(3, SIZE, green=120)), against, cav, 0)
    null, _ = cavs.tcav(maps_of(probe, photos(4, SIZE)), against, cav, 0)
    assert (red == 1).all()
    assert (green < 0.2).all()
    assert cavs.p_value(red, null) < 0.01 < cavs.p_value(green, null)
