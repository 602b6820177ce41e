"""The engine against float64 double backward on whole networks."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from twice_derived import data, double_backward, off, spread

from dop_fast import engine, masks
from dop_fast.engine import derivatives
from dop_fast.models import build, prunable


def vision_transformer() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight, std=0.1)  # zero in a fresh one, and so all else
    return model


def torchvision_network(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name, 10, 0)


def vgg() -> nn.Module:
    model = build("vgg19_bn", 10, 0)
    model.classifier = nn.Linear(512 * 49, 10)  # the real one has 120 million weights
    return model


NETWORKS = {
    "resnet20": torchvision_network("resnet20"),
    "resnet50": torchvision_network("resnet50"),
    "vgg19_bn": vgg,
    "vision transformer": vision_transformer,
    "convnext_tiny": torchvision_network("convnext_tiny"),
    "mobilenet_v2": torchvision_network("mobilenet_v2"),
    "efficientnet_b0": torchvision_network("efficientnet_b0"),
    "shufflenet_v2_x0_5": torchvision_network("shufflenet_v2_x0_5"),
    "densenet121": torchvision_network("densenet121"),
    "swin_t": torchvision_network("swin_t"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_s_derivatives_are_those_of_double_backward(name: str) -> None:
    model, batches = spread(NETWORKS[name]()), data(4, 32, 10)
    g, (hg,) = double_backward(model, batches)
    assert off(engine.gradients(model, batches, cross_entropy), g) < 1e-9
    for keep in (True, False):
        found = engine.hessian_gradient(model, batches, cross_entropy, keep=keep)
        assert off(found, hg) < 1e-9


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tape_can_follow_the_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the whole network was left to autograd")

    monkeypatch.setattr(derivatives, "ByAutograd", refuse)
    model = NETWORKS[name]().double()
    engine.gradients(model, data(2, 32, 10), cross_entropy)


def test_a_block_whose_norm_is_scaled_by_zero_has_finite_exact_products() -> None:
    model = build("resnet20", 10, 0).double()
    for value in model.modules():
        if isinstance(value, nn.BatchNorm2d):
            nn.init.zeros_(value.weight[: len(value.weight) // 2])
    batches = data(4, 32, 10)
    _, (hg,) = double_backward(model, batches)
    assert off(engine.hessian_gradient(model, batches, cross_entropy), hg) < 1e-9


def test_products_with_several_vectors_are_each_s_own() -> None:
    model, batches = spread(build("resnet20", 10, 0)), [*data(4, 32, 10), *data(3, 32, 10)]
    drawn = torch.Generator().manual_seed(4)
    vectors = [
        {
            name: torch.randn(w.shape, generator=drawn, dtype=w.dtype)
            for name, w in prunable(model).items()
        }
        for _ in range(3)
    ]
    _, expected = double_backward(model, batches, vectors)
    found = engine.hessian_products(model, batches, cross_entropy, vectors)
    assert all(off(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))
    # H is symmetric
    dot = [
        sum(float((vectors[i][name] * found[1 - i][name]).sum()) for name in vectors[0])
        for i in (0, 1)
    ]
    assert dot[0] == pytest.approx(dot[1], rel=1e-9)


def test_one_two_and_seven_chunks_agree_without_batch_norm() -> None:
    model, ((images, labels),) = spread(build("squeezenet1_1", 10, 0)), data(14, 32, 10)
    whole = engine.hessian_gradient(model, [(images, labels)], cross_entropy)
    for chunks in (2, 7):
        parts = list(zip(images.chunk(chunks), labels.chunk(chunks), strict=True))
        assert off(engine.hessian_gradient(model, parts, cross_entropy), whole) < 1e-10


@pytest.mark.parametrize("free", [0, 260_000_000, 2**40])  # a chunk takes 16 MB
def test_the_free_memory_decides_what_is_kept_and_no_result(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ((images, labels),) = build("resnet20", 10, 0).double(), data(12, 32, 10)
    batches = list(zip(images.chunk(4), labels.chunk(4), strict=True))
    runs = []
    expected = engine.hessian_gradient(model, batches, cross_entropy, keep=False)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        runs.append(len(targets))
        return cross_entropy(logits, targets)

    monkeypatch.setattr(derivatives, "free_bytes", lambda device: free)
    found = engine.hessian_gradient(model, batches, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kept = 8 - len(runs)
    assert (kept == 0) if free == 0 else (0 < kept < 4) if free < 2**40 else (kept == 4)


def test_the_chunk_that_fits_grows_with_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("resnet20", 10, 0)
    fit = []
    for free in (0, 200_000_000, 400_000_000):
        monkeypatch.setattr(derivatives, "free_bytes", lambda device, free=free: free)
        fit.append(engine.samples_that_fit(model, (3, 32, 32), cross_entropy))
    assert fit[0] == 2
    assert fit[2] == pytest.approx(2 * fit[1], abs=1)
    assert 5 < fit[1] < 30


def test_a_chunk_s_memory_is_free_before_the_next_is_read() -> None:
    model, last = build("resnet20", 10, 0), []

    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(3):
                assert all(image() is None for image in last)
                images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
                last.append(weakref.ref(images))
                yield images, torch.arange(2)
                del images

    gc.collect()
    gc.disable()  # without it, that is: what only the collector finds is found too late
    try:
        engine.hessian_gradient(model, Stream(), cross_entropy, keep=False)
    finally:
        gc.enable()
    assert len(last) == 6


def test_hooks_stay_and_none_is_added() -> None:
    model, seen = build("resnet20", 10, 0), []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    engine.hessian_gradient(model, data(4, 32, 10, torch.float32), cross_entropy)
    assert len(seen) == 1
    assert list(model._forward_hooks) == [handle.id]
    assert not any(m._forward_hooks or m._backward_hooks for m in list(model.modules())[1:])


# --- fast: bfloat16 after an exact forward
def cooled(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits / 200, labels)


@pytest.mark.parametrize(("name", "count", "side"), [("resnet20", 50, 32), ("resnet50", 8, 96)])
def test_fast_scores_are_as_good_as_those_of_float32(name: str, count: int, side: int) -> None:
    images, labels = data(count, side, 10, torch.float32)[0]

    def scores(precision: str, dtype: torch.dtype) -> Tensor:
        copy = build(name, 10, 0).to(dtype)
        hg = engine.hessian_gradient(copy, [(images.to(dtype), labels)], cooled, precision)
        return torch.cat(
            [(hg[key] * w.detach()).double().flatten() for key, w in prunable(copy).items()]
        )

    def kept(values: Tensor) -> Tensor:
        return masks.keep_top({"all": values}, 0.95).masks["all"]

    exact = scores("exact", torch.float64)
    shares = {}
    for precision in ("exact", "fast"):
        found = scores(precision, torch.float32)
        assert torch.cosine_similarity(found, exact, 0) >= 0.999
        both = kept(found) & kept(exact)
        shares[precision] = float(both.sum() / (kept(found) | kept(exact)).sum())
    assert shares["fast"] >= shares["exact"] - 0.02
