"""The engine against float64 double backward: whole networks, and every rule by itself."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from dop_fast import engine, masks
from dop_fast.engine import derivatives
from dop_fast.engine.sweeps import Recording
from dop_fast.engine.tape import Unsupported
from dop_fast.models import build, prunable

Batches = Sequence[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


def double_backward(
    model: nn.Module, batches: Batches, vectors: Sequence[Weights] | None = None
) -> tuple[Weights, list[Weights]]:
    """Return g and, for each vector (or for g), Hv of the mean loss; dropout is off."""
    model.eval()
    for module in model.modules():
        module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
    weights = {name: w.detach().requires_grad_() for name, w in prunable(model).items()}
    others = {name: value.detach() for name, value in model.named_parameters()}
    count = sum(len(labels) for _, labels in batches)

    def loss() -> Tensor:
        parts = []
        for images, labels in batches:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = functional_call(model, {**others, **weights, **buffers}, (images,))
            parts.append(cross_entropy(logits, labels) * len(labels) / count)
        return torch.stack(parts).sum()

    leaves = list(weights.values())
    with sdpa_kernel(SDPBackend.MATH):
        g = torch.autograd.grad(loss(), leaves, create_graph=True, materialize_grads=True)
        slopes = {name: x.detach() for name, x in zip(weights, g, strict=True)}
        products = []
        for vector in [slopes] if vectors is None else vectors:
            z = sum((vector[name] * x).sum() for name, x in zip(weights, g, strict=True))
            hv = torch.autograd.grad(z, leaves, retain_graph=True, materialize_grads=True)
            products.append(dict(zip(weights, hv, strict=True)))
    return slopes, products


def off(found: Weights, exact: Weights) -> float:
    """Return the largest error of a layer, relative to the layer's norm."""
    assert found.keys() == exact.keys()
    return max(
        float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-30))
        for name in exact
    )


def data(count: int, side: int, classes: int, dtype: torch.dtype = torch.float64) -> Batches:
    drawn = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=drawn, dtype=torch.float64).to(dtype)
    return [(images, torch.randint(classes, (count,), generator=drawn))]


def spread(model: nn.Module) -> nn.Module:
    """Draw the parameters of norms and the biases, which are ones and zeros in a fresh model."""
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 1:
                value.copy_(0.5 + 0.3 * torch.randn(value.shape, generator=drawn))
    return model.double()


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


# --- each rule alone: between two layers, so that its input and its output bend with the weights
class Between(nn.Module):
    """A convolution, an operation, and a linear layer on what comes out."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.operation = operation
        self.last = nn.LazyLinear(3)
        self.double()
        self(torch.randn(2, 3, 6, 6, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.operation(self.first(images)).flatten(1))


def module(make: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    torch.manual_seed(3)
    return spread(make())


def norm() -> Callable[[Tensor], Tensor]:
    return module(lambda: nn.BatchNorm2d(4))


def used_twice(y: Tensor) -> Tensor:
    return y.relu() * y


def added_to_itself(y: Tensor) -> Tensor:
    return (y + y).relu()


def onto_constant(x: Tensor) -> Tensor:
    total = torch.ones_like(x)
    total += x
    return total * x


class Doubled(torch.autograd.Function):
    """The identity, with a backward that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * grads[0]


def written_view(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0] *= 2
    return y.square()


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "grouped": module(lambda: nn.Conv2d(4, 8, 3, groups=2, stride=2)),
    "dilated": module(lambda: nn.Conv2d(4, 2, 2, dilation=3)),
    "transposed": module(lambda: nn.ConvTranspose2d(4, 2, 3, stride=2)),
    "one-dimensional": lambda x: module(lambda: nn.Conv1d(4, 2, 3))(x.flatten(2)),
    "tokens": lambda x: module(lambda: nn.Linear(4, 5))(x.flatten(2).transpose(1, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2)] * 3),
    "bmm": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "einsum": lambda x: torch.einsum("nchw,ncvw->nhv", x, x),
    "broadcast product": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "squeeze and excite": module(lambda: torchvision.ops.SqueezeExcitation(4, 2)),
    "quotient": lambda x: x / (1 + x.square()),
    "scaled": lambda x: 2 * x / 3 - x.mean(),
    "constants": lambda x: (1 - x) * (x + torch.arange(6.0, dtype=x.dtype)),
    "added with alpha": lambda x: torch.add(x, x.square(), alpha=-0.5),
    "broadcast sum": lambda x: x.square() + x.mean(1, keepdim=True),
    "concatenated": lambda x: torch.cat([x, torch.ones_like(x), x * x], 1),
    "stacked": lambda x: torch.stack([x, x.tanh()], 1),
    "split": lambda x: x.split([1, 3], 1)[1] * x.split([1, 3], 1)[0],
    "views": lambda x: x.permute(0, 2, 3, 1)[:, 1:-1:2].unsqueeze(1).transpose(1, 4)[..., 0].exp(),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1) * x[:, 1:],
    "sums": lambda x: x.sum((0, 2), keepdim=True) * x,
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, 1).square(),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (4, 3)).square(),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1).square(),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.2).square(),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(2).square(),
    "logsumexp": lambda x: x.logsumexp(1),
    "layer norm": module(lambda: nn.LayerNorm([6, 6])),
    "group norm": module(lambda: nn.GroupNorm(2, 4)),
    "instance norm": module(lambda: nn.InstanceNorm2d(4, affine=True)),
    "batch norm": norm(),
    "batch norm without weights": module(lambda: nn.BatchNorm2d(4, affine=False)),
    "batch norm of vectors": lambda x: module(lambda: nn.BatchNorm1d(144))(x.flatten(1)),
    "batch norm and ReLU": lambda x: norm()(x).relu(),
    "batch norm used twice": lambda x: used_twice(norm()(x)),
    "a residual block": lambda x: (norm()(x.square()) + x).relu(),
    "two norms in a block": lambda x: (norm()(x) + norm()(x * x)).relu_(),
    "a norm added to itself": lambda x: added_to_itself(norm()(x)),
    "in place": lambda x: x.mul_(2).add_(1).relu_().square(),
    "in place, smooth": lambda x: F.silu(x * x, inplace=True) + F.hardswish(x * 1, inplace=True),
    "onto a constant": onto_constant,
    "rolled and padded": lambda x: F.pad(x.roll((1, 2), (2, 3)), (1, 0, 2, 1), value=1.0).square(),
    "resized": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear").square(),
    "sorted": lambda x: x.sort(1).values.cumsum(1).square(),
    "without gradient": lambda x: x * x.detach(),
    "a view written": written_view,
    "a backward of its own": lambda x: Doubled.apply(x.square()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_s_derivatives_are_those_of_double_backward(name: str) -> None:
    model, batches = Between(OPERATIONS[name]), data(5, 6, 3)
    g, (hg,) = double_backward(model, batches)
    assert off(engine.gradients(model, batches, cross_entropy), g) < 1e-10
    for keep in (True, False):
        found = engine.hessian_gradient(model, batches, cross_entropy, keep=keep)
        assert off(found, hg) < 1e-9


def test_what_is_kept_is_as_it_was_before_an_operation_in_place() -> None:
    # autograd refuses this one
    batches = data(5, 6, 3)
    _, (hg,) = double_backward(Between(lambda x: x * x + (x + x.sin())), batches)
    model = Between(lambda x: x * x + x.add_(x.sin()))
    assert off(engine.hessian_gradient(model, batches, cross_entropy), hg) < 1e-9


@pytest.mark.parametrize("name", ["a view written", "a backward of its own"])
def test_what_a_tape_cannot_follow_is_refused_by_it(name: str) -> None:
    model = Between(OPERATIONS[name])
    images = data(5, 6, 3)[0][0]
    weights = {key: value.detach() for key, value in prunable(model).items()}
    with pytest.raises(Unsupported):
        Recording(lambda: functional_call(model, weights, (images,)).sum(), weights)
    assert Doubled.apply(images) is not images  # the guard is taken away again


def test_a_function_that_pytorch_cannot_derive_twice_is_derived_by_its_rule() -> None:
    batches = data(5, 6, 3)
    _, (hg,) = double_backward(Between(lambda x: (x / 6 + 0.5).clamp(0, 1) * x), batches)
    model = Between(lambda x: F.hardsigmoid(x) * x)
    assert off(engine.hessian_gradient(model, batches, cross_entropy), hg) < 1e-9


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


@pytest.mark.parametrize("free", [0, 130_000_000, 2**40])  # a chunk takes 16 MB
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
    for free in (0, 100_000_000, 200_000_000):
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
