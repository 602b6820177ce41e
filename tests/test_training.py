import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from array_images import noisy
from safetensors import safe_open
from tiny_training import (
    ABOUT,
    CONFIG,
    CPU,
    DATA,
    TRAIN_DATA,
    assert_same_state,
    fit,
    half_mask,
    network,
    untimed,
)
from torch import nn

from dop_fast import precision, runs, seeding, training
from dop_fast.config import TrainConfig
from dop_fast.errors import ModelError, StoreError
from dop_fast.training import TrainData, loader, loop, masking, step


class WatchedSGD(masking.MaskedSGD):
    """Looks at the removed weights after every step."""

    after: Callable[["WatchedSGD"], None]

    def step(self, closure: None = None) -> None:
        super().step(closure)
        self.after()  # type: ignore[call-arg]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_removed_weights_and_their_momentum_stay_zero_after_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    model = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    mask = half_mask(model)
    steps = 0

    def look(optimizer: torch.optim.SGD) -> None:
        nonlocal steps
        steps += 1
        weights = dict(model.named_parameters())
        for name, keep in mask.masks.items():
            momentum = optimizer.state[weights[name]]["momentum_buffer"]
            assert weights[name].dtype == momentum.dtype == torch.float32
            assert not weights[name][~keep].any()
            assert not momentum[~keep].any()
            assert momentum[keep].any()

    monkeypatch.setattr(WatchedSGD, "after", look, raising=False)
    monkeypatch.setattr(step, "MaskedSGD", WatchedSGD)
    for _ in fit(tmp_path, model, replace(CONFIG, amp=amp), mask):
        pass
    assert steps == 4 * 5
    for name, keep in mask.masks.items():
        value = model.state_dict()[name]
        assert (value[keep] != start[name][keep]).all()
        assert (value[keep] != 0).all()


def test_a_mask_that_slips_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    monkeypatch.setattr(step, "MaskedSGD", WatchedSGD)
    monkeypatch.setattr(WatchedSGD, "after", lambda optimizer: None, raising=False)
    epochs = fit(tmp_path, model, masks=half_mask(model))
    next(epochs)
    stored = (tmp_path / runs.CHECKPOINT).read_bytes()

    @torch.no_grad()
    def slip(optimizer: torch.optim.SGD) -> None:
        model[3].weight += 1  # type: ignore[operator]

    monkeypatch.setattr(WatchedSGD, "after", slip)
    with pytest.raises(AssertionError, match=r"3\.weight"):
        next(epochs)
    assert (tmp_path / runs.CHECKPOINT).read_bytes() == stored


def test_training_steps_are_those_of_plain_sgd(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2, milestones=(0.5,), augment="none")
    model, plain = network(0), network(0)
    mask = half_mask(model)
    list(fit(tmp_path, model, config, mask))

    weights = dict(plain.named_parameters())
    momentum = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    keep = {name: mask.masks.get(name, torch.ones(1)) for name in weights}
    with torch.no_grad():
        for name, weight in weights.items():
            weight *= keep[name]
    images = TRAIN_DATA.train
    for epoch, lr in ((1, 0.05), (2, 0.005)):
        order = seeding.stream(0, "order", epoch).permutation(36)
        for index in (order[:8], order[8:16], order[16:24], order[24:32], order[32:]):
            pixels = torch.from_numpy(images.load(index)).permute(0, 3, 1, 2)
            logits = plain((pixels / 255 - 0.5) / 0.25)
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(images.labels[index]))
            gradients = torch.autograd.grad(loss, list(weights.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    momentum[name] = 0.9 * momentum[name] + gradient + 1e-2 * weight
                    weight -= lr * momentum[name] * keep[name]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("amp", ["off", "auto", "fp16"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, amp: str) -> None:
    config = replace(CONFIG, amp=amp)
    whole, broken, resumed = network(), network(), network()
    mask = half_mask(whole)
    expected = list(fit(tmp_path / "whole", whole, config, mask))

    epochs = fit(tmp_path / "broken", broken, config, mask)
    first = [next(epochs), next(epochs)]
    epochs.close()
    again = list(fit(tmp_path / "broken", resumed, config, mask))

    assert again[:2] == first
    assert untimed(again) == untimed(expected)
    assert_same_state(resumed, whole)
    weights = [(tmp_path / name / runs.WEIGHTS).read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert [row["epoch"] for row in runs.metrics(tmp_path / "broken")] == [1, 2, 3, 4]


RENAMED = 14  # two epochs, the first of them the best, write seven files with two renames each


@pytest.mark.parametrize("written", range(RENAMED + 1))
def test_a_kill_while_writing_leaves_an_epoch_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    config = replace(CONFIG, epochs=2)
    whole, resumed = network(), network()
    expected = list(fit(tmp_path / "whole", whole, config))
    rename, renamed = Path.replace, 0

    def killed(path: Path, target: Path) -> Path:
        nonlocal renamed
        if renamed == written:
            raise KeyboardInterrupt
        renamed += 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        if written == RENAMED:
            list(fit(tmp_path / "killed", network(), config))
        else:
            with pytest.raises(KeyboardInterrupt):
                list(fit(tmp_path / "killed", network(), config))
    assert untimed(list(fit(tmp_path / "killed", resumed, config))) == untimed(expected)
    assert_same_state(resumed, whole)
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {runs.METRICS, runs.CHECKPOINT, runs.BEST, runs.WEIGHTS}


def test_an_error_in_the_middle_of_an_epoch_costs_that_epoch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = network(), network()
    expected = list(fit(tmp_path / "whole", whole))
    normalise, calls = step.normalise, 0

    def out_of_memory(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 13:
            raise MemoryError
        return normalise(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(step, "normalise", out_of_memory)
        with pytest.raises(MemoryError):
            list(fit(tmp_path / "broken", network()))
    assert len(runs.metrics(tmp_path / "broken")) == 2
    assert untimed(list(fit(tmp_path / "broken", resumed))) == untimed(expected)
    assert_same_state(resumed, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": replace(CONFIG, lr=0.1)}, "lr"),
        ({"seed": 1}, "seed"),
        ({"masks": half_mask(network())}, "mask"),
        ({"data": replace(TRAIN_DATA, train=replace(TRAIN_DATA.train, fingerprint="x"))}, "data"),
    ],
)
def test_another_training_is_not_gone_on_with(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    next(fit(tmp_path, network()))
    with pytest.raises(StoreError, match=named):
        next(fit(tmp_path, network(), **change))  # type: ignore[arg-type]


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    next(fit(tmp_path, network()))
    path = tmp_path / runs.CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError) as caught:
        next(fit(tmp_path, network()))
    assert "--force" in caught.value.hint


def test_torchs_global_stream_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    list(fit(tmp_path, network(), replace(CONFIG, epochs=1, augment="resized")))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_eval_mode_is_trained_all_the_same(tmp_path: Path) -> None:
    one, other = network(), network().eval()
    assert untimed(list(fit(tmp_path / "1", one))) == untimed(list(fit(tmp_path / "2", other)))


def test_another_seed_gives_another_training(tmp_path: Path) -> None:
    one, other = (list(fit(tmp_path / str(seed), network(), seed=seed)) for seed in (0, 1))
    assert one[0].train_loss != other[0].train_loss


def test_the_paper_s_rate_falls_at_epochs_30_60_and_90() -> None:
    rates = [training.learning_rate(TrainConfig(), step, 120 * 7) for step in range(120 * 7)]
    falls = [step / 7 for step in range(1, 120 * 7) if rates[step] != rates[step - 1]]
    assert falls == [30, 60, 90]
    assert [rates[step * 7] for step in (0, 30, 60, 90)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])


def test_the_warm_up_rises_linearly_to_the_rate() -> None:
    config = TrainConfig(lr=0.4, warmup=0.1)
    rates = [training.learning_rate(config, step, 40) for step in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_rate_of_each_epoch_is_told(tmp_path: Path) -> None:
    rates = [epoch.lr for epoch in fit(tmp_path, network())]
    assert rates == pytest.approx([0.05, 0.005, 5e-4, 5e-5])


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_stops(tmp_path: Path, epoch: int) -> None:
    config = replace(CONFIG, lr=1e30, milestones=())
    model = network()
    if epoch == 2:
        epochs = fit(tmp_path, model, CONFIG)
        next(epochs)
        stored = (tmp_path / runs.CHECKPOINT).read_bytes()
        with torch.no_grad():
            model[8].bias[0] = math.nan  # type: ignore[index, operator]
    else:
        epochs = fit(tmp_path, model, config)
    with pytest.raises(ModelError, match=f"epoch {epoch}, at a learning rate of") as caught:
        next(epochs)
    assert "--lr" in caught.value.hint
    assert len(runs.metrics(tmp_path)) == epoch - 1
    if epoch == 2:
        assert "after epoch 1 is kept" in caught.value.hint
        assert (tmp_path / runs.CHECKPOINT).read_bytes() == stored


def test_a_last_step_that_breaks_the_network_stops(tmp_path: Path) -> None:
    one_step = replace(CONFIG, lr=1e38, batch_size=36)
    with pytest.raises(ModelError, match="epoch 1"):
        next(fit(tmp_path, network(), one_step))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_loss_that_is_not_finite_stops_before_the_epoch_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalise, steps = step.normalise, 0

    def counted(*args: object) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return normalise(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(step, "normalise", counted)
    monkeypatch.setattr(loop, "CHECK_STEPS", 2)
    with pytest.raises(ModelError):
        next(fit(tmp_path, network(), replace(CONFIG, lr=1e30)))
    assert steps == 3  # of 5; the first step's loss is still finite


def test_the_first_step_whose_loss_is_not_finite_is_named(tmp_path: Path) -> None:
    config = replace(CONFIG, lr=1e6, augment="none", milestones=())
    model = network(0)
    one = step.Step(model, DATA, config, None)
    losses = []
    for index in loader.training_order(36, 8, 0, 1):
        pixels = torch.from_numpy(TRAIN_DATA.train.load(index))
        losses.append(float(one(pixels, torch.from_numpy(TRAIN_DATA.train.labels[index]), 1e6)))
    first = [math.isfinite(loss) for loss in losses].index(False)
    assert first > 0
    said = rf"at step {first + 1} of epoch 1, at a learning rate of 1e\+06"
    with pytest.raises(ModelError, match=said):  # though only the last loss is looked at
        next(fit(tmp_path, network(0), config))
    assert not (tmp_path / runs.CHECKPOINT).exists()


def test_top_5_of_three_classes_is_always_right() -> None:
    model = network()
    assert training.evaluate(model, TRAIN_DATA.val, DATA, CPU).top5 == 1


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_leaves_the_model_as_it_was(mode: bool) -> None:
    model, twin = network().train(mode), network()
    training.evaluate(model, TRAIN_DATA.val, DATA, CPU)
    assert model.training == mode
    assert_same_state(model, twin)


def test_a_training_learns(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=15, weight_decay=1e-4)
    data = TrainData(noisy(96, 0), noisy(48, 1), DATA)
    *_, last = fit(tmp_path, network(0), config, data=data)
    # chance is 1/3, and 30 of 48 right by chance has a probability below 1e-4
    assert last.top1 > 30 / 48


def test_the_final_weights_give_the_last_accuracy(tmp_path: Path) -> None:
    model, fresh = network(), network()
    *_, last = fit(tmp_path, model)
    with safe_open(tmp_path / runs.WEIGHTS, framework="pt") as file:
        assert file.metadata().items() >= ABOUT.items()
        fresh.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
    found = training.evaluate(fresh, TRAIN_DATA.val, DATA, CPU, CONFIG.batch_size, "off")
    assert (found.top1, found.top5, found.loss) == (last.top1, last.top5, last.val_loss)


def test_bf16_is_not_imitated_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        for amp, expected in (("auto", able), ("off", False), ("bf16", True)):
            with precision.autocast(CPU, precision.training_type(CPU, amp)):
                assert torch.is_autocast_enabled("cpu") == expected


def test_a_gpu_without_bf16_trains_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, able=able, **__: able)
        assert precision.training_type(torch.device("cuda"), "auto") == expected


@pytest.mark.gpu
def test_a_gpu_trains_and_holds_the_mask(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device, model = torch.device("cuda"), network()
    mask = half_mask(model)
    config = replace(CONFIG, amp="auto")
    epochs = training.fit(
        model, TRAIN_DATA, config, tmp_path, masks=mask, seed=0, device=device, about=ABOUT
    )
    assert len(list(epochs)) == 4
    for name, keep in mask.masks.items():
        assert not model.state_dict()[name].cpu()[~keep].any()
    assert json.loads((tmp_path / runs.METRICS).read_text().splitlines()[-1])["epoch"] == 4
