"""SGD with a mask: torch's where nothing is removed, exactly zero where something is."""

import copy
import os
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dop_fast.kernels import bits, lists, masked_step
from dop_fast.kernels.masked_step import Rule

SHAPES = [(5, 3, 3, 3), (7,), (), (1, 1), (41, 101), (16, 8, 1, 1), (4097,), (8,), (0, 3)]
Step = Callable[..., None]
PLAIN = Rule(0.1)
NAN, INF = torch.nan, torch.inf


def by_gpu(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    rule: Rule,
    *,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run the Triton kernel, on a GPU or interpreted."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (torch.cuda.is_available() or interpreted):
        pytest.skip("needs CUDA, or TRITON_INTERPRET=1")
    from dop_fast.kernels.masked_step import gpu

    device = "cpu" if interpreted else "cuda"
    columns = [[x.to(device) for x in column] for column in (weights, gradients, momenta, masks)]
    scalars = None if scaling is None else (scaling[0].to(device), scaling[1].to(device))
    gpu.step_(columns[0], columns[1], columns[2], columns[3], rule, scaling=scalars)
    for column, moved in ((weights, columns[0]), (momenta, columns[2])):
        for value, found in zip(column, moved, strict=True):
            value.copy_(found)


twins = pytest.mark.parametrize(
    "by",
    [masked_step.step_, masked_step.reference.step_, by_gpu],
    ids=["cpu", "reference", "gpu"],
)


def made(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=drawn, dtype=dtype) for shape in SHAPES]
    values[0] = values[0].to(memory_format=torch.channels_last)
    return values


def packed(kept: Sequence[Tensor]) -> list[Tensor]:
    """Pack masks in the order in which `made` lies in memory; every second one is empty."""
    return [
        bits.pack(keep.permute(0, 2, 3, 1) if index == 0 else keep)
        if index % 2 == 0
        else torch.empty(0, dtype=torch.uint8)
        for index, keep in enumerate(kept)
    ]


def exact(
    weight: Tensor, gradient: Tensor, momentum: Tensor, rule: Rule, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return weight and momentum after torch's own step in float64, the mask applied."""
    parameter = torch.nn.Parameter(weight.double())
    sgd = torch.optim.SGD([parameter], rule.lr, rule.momentum, 0, rule.weight_decay, rule.nesterov)
    parameter.grad = gradient.double()
    sgd.state[parameter]["momentum_buffer"] = momentum.double()
    sgd.step()
    found = parameter.detach(), sgd.state[parameter]["momentum_buffer"]
    if keep is None:
        return found
    return torch.where(keep, found[0], 0), torch.where(keep, found[1], 0)


@twins
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_is_torchs_with_the_mask_applied(
    by: Step, nesterov: bool, scale: float | None
) -> None:
    rule = Rule(0.1, 0.9, 1e-2, nesterov)
    weights, gradients, momenta = made(0), made(1), made(2)
    kept = [part > 0.4 for part in made(3)]
    expected = [
        exact(weights[i], gradients[i], momenta[i], rule, kept[i] if i % 2 == 0 else None)
        for i in range(len(SHAPES))
    ]
    scaling = None
    if scale:
        gradients = [scale * gradient for gradient in gradients]
        scaling = torch.tensor(scale), torch.tensor(0.0)
    by(weights, gradients, momenta, packed(kept), rule, scaling=scaling)
    for weight, momentum, value in zip(weights, momenta, expected, strict=True):
        torch.testing.assert_close(weight.double(), value[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(momentum.double(), value[1], rtol=1e-6, atol=1e-6)


def test_double_precision_is_torchs_to_the_last_bits() -> None:
    rule = Rule(0.1, 0.9, 1e-2)
    weights, gradients, momenta = (made(seed, torch.float64) for seed in range(3))
    layers = zip(weights, gradients, momenta, strict=True)
    expected = [exact(*layer, rule, None) for layer in layers]
    empty = [torch.empty(0, dtype=torch.uint8)] * len(SHAPES)
    masked_step.step_(weights, gradients, momenta, empty, rule)
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, value[0], rtol=1e-15, atol=1e-15)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, interpreting Triton
@twins
def test_not_a_number_shows_in_what_is_kept_and_does_not_leak_from_what_is_not(by: Step) -> None:
    bad = torch.tensor([NAN, NAN, INF, INF, -INF, -INF, 1.0, 1.0])
    mask = [bits.pack(torch.tensor([True, False] * 4))]
    for place in range(3):  # in the weight, in the gradient, in the momentum
        parts = [torch.ones(8) for _ in range(3)]
        parts[place] = bad.clone()
        weight, gradient, momentum = parts
        by([weight], [gradient], [momentum], mask, Rule(0.5, 0.5, 0.5))
        for value in (weight, momentum):
            assert value[1::2].tolist() == [0, 0, 0, 0]
            assert not value[1::2].signbit().any()
        assert not weight[:6:2].isfinite().any()
        assert weight[6].isfinite()


@twins
def test_a_gradient_that_overflowed_leaves_all_as_it_is(by: Step) -> None:
    weights, gradients, momenta = made(0), made(1), made(2)
    gradients[0].fill_(INF)
    before = copy.deepcopy((weights, momenta))
    scaling = torch.tensor(65536.0), torch.tensor(1.0)
    by(weights, gradients, momenta, packed([w > 0 for w in weights]), PLAIN, scaling=scaling)
    for found, value in zip((*weights, *momenta), (*before[0], *before[1]), strict=True):
        assert torch.equal(found, value)


@twins
@settings(max_examples=25, deadline=None)
@given(
    drawn=st.integers(0, 2**31),
    steps=st.integers(1, 6),
    size=st.integers(1, 70),
    share=st.floats(0, 1),
    rule=st.builds(
        Rule, st.floats(0, 10), st.floats(0, 0.99), st.floats(0, 1), st.booleans()
    ),
)  # fmt: skip
def test_removed_weights_are_zero_after_any_number_of_steps(
    by: Step, drawn: int, steps: int, size: int, share: float, rule: Rule
) -> None:
    rng = torch.Generator().manual_seed(drawn)
    keep = torch.rand(size, generator=rng) < share
    weight, momentum = torch.randn(2, size, generator=rng)
    for _ in range(steps):
        gradient = 1e3 * torch.randn(size, generator=rng)
        by([weight], [gradient], [momentum], [bits.pack(keep)], rule)
        assert not weight[~keep].any() and not momentum[~keep].any()


def test_layers_may_lie_in_any_memory_and_on_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lists, "PIECE", 64)
    rule, keep = Rule(0.1, 0.9, 1e-2), torch.randn(9, 5, 3, 3) > 0
    plain, gradient, running = torch.randn(3, 9, 5, 3, 3)
    strided = torch.randn(9, 5, 3, 6)[..., ::2].copy_(gradient)
    expected = exact(plain, gradient, running, rule, keep)
    kinds = (torch.contiguous_format, torch.channels_last)
    for kind, other, threads in product(kinds, (*kinds, None), (1, 3)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        weight, momentum = (x.clone().to(memory_format=kind) for x in (plain, running))
        slope = strided if other is None else gradient.to(memory_format=other)
        mask = bits.in_memory_order(bits.pack(keep), weight)
        masked_step.step_([weight], [slope], [momentum], [mask], rule)
        torch.testing.assert_close(weight.double(), expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(momentum.double(), expected[1], rtol=1e-6, atol=1e-6)


def test_no_parameters_are_nothing_to_do() -> None:
    masked_step.step_([], [], [], [], PLAIN)


@pytest.mark.parametrize(
    ("weight", "gradient", "momentum", "mask"),
    [
        (torch.zeros(3), torch.zeros(4), torch.zeros(3), torch.zeros(1, dtype=torch.uint8)),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(1)),
        (torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, 3).T, torch.zeros(0)),
    ],
    ids=["gradient", "bits", "type", "layout"],
)
def test_what_does_not_fit_is_refused(
    weight: Tensor, gradient: Tensor, momentum: Tensor, mask: Tensor
) -> None:
    with pytest.raises(ValueError):
        masked_step.step_([weight], [gradient], [momentum], [mask], PLAIN)
