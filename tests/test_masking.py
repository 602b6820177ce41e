"""Removed weights and their momentum are zero wherever a training's state goes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dop_fast.config import DataConfig, TrainConfig
from dop_fast.errors import ModelError
from dop_fast.masks import MaskSet
from dop_fast.training.masking import MaskedSGD, check
from dop_fast.training.step import Step

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
KEEP = {
    "0.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) > 0,
    "3.weight": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)) > 0,
}
MASKS = MaskSet(KEEP)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
        )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        slope = torch.randn(weight.shape, generator=drawn)
        weight.grad = torch.empty_like(weight).copy_(slope)
    optimizer.step()


def momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        name: optimizer.state[weight]["momentum_buffer"]
        for name, weight in model.named_parameters()
    }


def assert_holds(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, running = dict(model.named_parameters()), momentum(model, optimizer)
    for name, keep in KEEP.items():
        for value in (weights[name], running[name]):
            assert not value[~keep].any()
            assert value[keep].all()


def test_a_deepcopy_goes_on_alike() -> None:
    model = network()
    optimizer = MaskedSGD(model, MASKS, **SETTINGS)
    step(model, optimizer, 0)
    twin, other = copy.deepcopy((model, optimizer))
    for one, moving in ((model, optimizer), (twin, other)):
        step(one, moving, 1)
        assert_holds(one, moving)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])
    assert not any(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_dict_brings_the_mask_along() -> None:
    model, fresh = network(), network()
    optimizer = MaskedSGD(model, MASKS, **SETTINGS)
    step(model, optimizer, 0)
    dense = MaskedSGD(fresh, None, **SETTINGS)
    fresh.load_state_dict(model.state_dict())
    dense.load_state_dict(optimizer.state_dict())
    step(fresh, dense, 1)
    assert_holds(fresh, dense)


def test_an_average_of_masked_weights_is_masked() -> None:
    model = network()
    optimizer = MaskedSGD(model, MASKS, **SETTINGS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for seed in range(5):
        step(model, optimizer, seed)
        average.update_parameters(model)
    check(MASKS, average.module.state_dict())


def test_without_a_mask_it_is_torchs_sgd() -> None:
    model, plain = network().double(), network().double()
    ours = MaskedSGD(model, None, **SETTINGS, nesterov=True)
    theirs = torch.optim.SGD(plain.parameters(), **SETTINGS, nesterov=True)
    for seed in range(4):
        step(model, ours, seed)
        step(plain, theirs, seed)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-13, atol=1e-13)


def test_parameters_without_a_gradient_stay() -> None:
    model = network()
    optimizer = MaskedSGD(model, MASKS, **SETTINGS)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state", ["weights", "momentum"])
def test_what_moved_is_named(state: str) -> None:
    model = network()
    optimizer = MaskedSGD(model, MASKS, **SETTINGS)
    step(model, optimizer, 0)
    states = {"weights": model.state_dict(), "momentum": momentum(model, optimizer)}
    check(MASKS, *states.values())
    states[state]["3.weight"][~KEEP["3.weight"]] = 1e-30
    with pytest.raises(AssertionError, match=r"3\.weight"):
        check(MASKS, *states.values())


def stepped(config: TrainConfig) -> Step:
    model = network()
    made = Step(model, DataConfig(size=8), config, MASKS)
    drawn = torch.Generator().manual_seed(0)
    for _ in range(3):
        pixels = torch.randint(0, 256, (6, 8, 8, 3), generator=drawn, dtype=torch.uint8)
        made(pixels, torch.arange(6) % 5, 0.1)
    assert_holds(model, made.optimizer)
    return made


@pytest.mark.parametrize(("setting", "mode"), [("on", "default"), ("graphs", "reduce-overhead")])
def test_a_compiled_step_holds_the_mask(
    setting: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = torch.compile, []

    def without_code(model: nn.Module, *, mode: str) -> Any:
        asked.append(mode)
        return whole(model, backend="aot_eager")  # traced alike; a C++ compiler takes a minute

    monkeypatch.setattr(torch, "compile", without_code)
    compiled = stepped(TrainConfig(compile=setting, amp="off"))
    plain = stepped(TrainConfig(amp="off"))
    layers = zip(
        compiled.optimizer.param_groups[0]["params"],
        plain.optimizer.param_groups[0]["params"],
        strict=True,
    )
    for found, expected in layers:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert asked == [mode]


def test_a_network_that_does_not_compile_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode: whole(f, backend=without_compiler))
    with pytest.raises(ModelError, match=r"torch\.compile fails: .*no C\+\+ compiler") as caught:
        stepped(TrainConfig(compile="on", amp="off"))
    assert "--compile off" in caught.value.hint


def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_falls() -> None:
    model = network()
    made = Step(model, DataConfig(size=8), TrainConfig(amp="fp16"), MASKS)
    made.scaler.load_state_dict({**made.scaler.state_dict(), "scale": 2.0**40})
    before = copy.deepcopy(model.state_dict())
    made(torch.full((6, 8, 8, 3), 255, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert made.scaler.get_scale() == 2.0**39
