"""The engine's rules, each by itself, against float64 double backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from twice_derived import data, double_backward, off, spread

from dop_fast import engine
from dop_fast.engine.sweeps import Recording
from dop_fast.engine.tape import Unsupported
from dop_fast.models import prunable


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
