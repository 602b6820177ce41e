"""One contract over every criterion, and SNIP and GraSP against independent derivatives."""

import inspect
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, masks
from dop_fast.errors import ConfigError, DataError, ModelError
from dop_fast.models import build, prunable

Batches = list[tuple[Tensor, Tensor]]
# sbp-sr takes no network without residual blocks: test_criteria_sbp_sr.py
NAMES = tuple(name for name in criteria.names() if name != "sbp-sr")
DATA_AWARE = [name for name in NAMES if criteria.load(name).NEEDS_DATA]


def plain() -> nn.Module:
    """Return a smooth conv net without batch norm, with dropout, for 3 x 6 x 6 images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Dropout(0.5), nn.AvgPool2d(3),
        nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """A conv net with batch norm, a shortcut and a layer that the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(4)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.after(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Pixels as tokens: fused attention kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(2).transpose(1, 2))
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention()


def chunks(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batches:
    """Return the same samples in chunks of these sizes."""
    drawn = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 6, 6, generator=drawn, dtype=torch.float64)
    labels = torch.randint(3, (sum(sizes),), generator=drawn)
    parts = zip(images.to(dtype).split(list(sizes)), labels.split(list(sizes)), strict=True)
    return [(x.contiguous(), y) for x, y in parts]


def score(name: str, model: nn.Module, batches: Any, **knobs: Any) -> dict[str, Tensor]:
    return criteria.load(name).score(model, batches, cross_entropy, 0, **knobs)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Fail unless every layer is off by at most `share` of its largest value.

    Shares above 1e-5 are for float32, which has seven digits and loses some to cancellation.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        off = (found[name].double() - value.double()).abs().max()
        assert off <= share * value.abs().max(), f"{name} is off by {off}"


def test_names_are_the_files_and_cost_no_torch() -> None:
    code = (
        "import sys; from dop_fast import criteria; names = criteria.names();"
        "assert not {'torch', 'numpy'} & set(sys.modules); print(*names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == criteria.names()
    assert {"grasp", "magnitude", "random", "snip"} <= set(NAMES)
    assert not any(name.startswith("_") or "_" in name for name in NAMES)


@pytest.mark.parametrize(("name", "hint"), [("snap", "snip"), ("grads", "grasp"), ("zzz", "snip")])
def test_an_unknown_criterion_is_refused_with_a_known_one(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=name) as refused:
        criteria.load(name)
    assert hint in refused.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_own_knobs_are_keyword_only_and_have_defaults(name: str) -> None:
    module = criteria.load(name)
    parameters = list(inspect.signature(module.score).parameters.values())
    common, knobs = parameters[:4], parameters[4:]
    assert [parameter.name for parameter in common] == ["model", "batches", "loss", "seed"]
    assert all(knob.kind is knob.KEYWORD_ONLY and knob.default is not knob.empty for knob in knobs)
    assert isinstance(module.NEEDS_DATA, bool)


@pytest.mark.parametrize("make", [plain, residual, attention])
@pytest.mark.parametrize("name", NAMES)
def test_scores_fit_the_weights(name: str, make: Any) -> None:
    model = make()
    scores = score(name, model, chunks(4, 3))
    assert list(scores) == list(prunable(model))
    for layer, weight in prunable(model).items():
        assert scores[layer].shape == weight.shape
        assert scores[layer].dtype == torch.float32
        assert scores[layer].device == weight.device
        assert not scores[layer].requires_grad
        assert scores[layer].isfinite().all()
        assert scores[layer].data_ptr() != weight.data_ptr()
    kept = masks.keep_top(scores, 0.7).kept
    assert kept == round(0.3 * sum(weight.numel() for weight in prunable(model).values()))


@pytest.mark.parametrize("make", [plain, residual])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_and_the_generator_are_left_as_found(name: str, make: Any) -> None:
    model = make()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    state = deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [value.grad for value in parameters]
    wanted = [value.requires_grad for value in parameters]
    random = torch.get_rng_state()

    score(name, model, chunks(4, 3))

    assert same(model.state_dict(), state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(value.grad is grad for value, grad in zip(parameters, grads, strict=True))
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert [value.requires_grad for value in parameters] == wanted
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_a_function_of_their_arguments(name: str) -> None:
    model = plain()
    first = score(name, model, chunks(4, 3))
    torch.manual_seed(99)
    model.eval().requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert same(first, score(name, model, chunks(4, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_how_samples_are_split_does_not_matter_without_batch_norm(name: str) -> None:
    whole = score(name, plain(), chunks(12))
    near(score(name, plain(), chunks(7, 4, 1)), whole, 1e-4)


@pytest.mark.parametrize("name", DATA_AWARE)
def test_batch_norm_takes_the_statistics_of_the_chunk(name: str) -> None:
    other = residual()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    assert same(score(name, residual(), chunks(6, 6)), score(name, other, chunks(6, 6)))
    assert not same(score(name, residual(), chunks(6, 6)), score(name, other, chunks(12)))


@pytest.mark.parametrize("name", DATA_AWARE)
def test_scoring_is_in_full_precision_and_gives_the_switches_back(name: str) -> None:
    backends = torch.backends
    switches: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul]
    seen = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append({switch.fp32_precision for switch in switches})
        return cross_entropy(logits, labels)

    try:
        torch.set_float32_matmul_precision("medium")
        found = [switch.fp32_precision for switch in switches]
        criteria.load(name).score(plain(), chunks(4), loss, 0)
        assert [switch.fp32_precision for switch in switches] == found
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "ieee" not in found
    assert seen and all(precisions == {"ieee"} for precisions in seen)


@pytest.mark.parametrize("name", DATA_AWARE)
def test_a_failing_loss_leaves_modes_and_switches_as_found(name: str) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise KeyError("mine")

    model, matmul = residual(), torch.backends.cuda.matmul
    found = matmul.fp32_precision
    with pytest.raises(KeyError, match="mine"):
        criteria.load(name).score(model, chunks(4), loss, 0)
    assert all(module.training for module in model.modules())
    assert matmul.fp32_precision == found


@pytest.mark.parametrize("name", DATA_AWARE)
def test_an_infinite_gradient_names_its_layer(name: str) -> None:
    model = plain()
    with torch.no_grad():
        model[7].weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"not finite in \d of \d layers, first in 0\.weight"):
        score(name, model, chunks(4))


@pytest.mark.parametrize("name", DATA_AWARE)
def test_no_samples_and_no_weights_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="no samples"):
        score(name, plain(), [])
    with pytest.raises(ModelError, match="no prunable weights"):
        score(name, nn.Sequential(nn.BatchNorm2d(3)), chunks(4))


def test_a_generator_of_batches_is_refused() -> None:
    with pytest.raises(DataError, match="only once") as refused:
        score("grasp", plain(), (batch for batch in chunks(4, 3)))
    assert "generator" in refused.value.hint


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [plain, residual, attention])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_scores_of_the_cpu(name: str, make: Any) -> None:
    found = score(name, make().cuda(), chunks(8, 5))
    assert all(value.is_cuda for value in found.values())
    near(
        {layer: value.cpu() for layer, value in found.items()},
        score(name, make(), chunks(8, 5)),
        1e-3,
    )


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
