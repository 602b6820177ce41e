"""NTK-SAP: what moves the spectrum of the neural tangent kernel (Wang et al., 2023).

|d/dm of the mean of |f(Z; m * theta) - f(Z; m * (theta + epsilon * n))|^2|, summed over draws of
normal inputs Z, of the weights theta, and of a normal n: places are scored, not the weights in
them, and without data. Removed weights score 0. Batch norm has, in both networks, the statistics
of Z in the first one, as constants, so that samples stay independent. A round needs a seed of its
own, to draw anew.

`clean` draws theta by permuting the weights of each layer, which is another draw of whatever
distribution the network was initialised with. `published` follows the authors' code
(YiteWang/NTK-SAP): theta is Kaiming normal over the fan-in, batch norm has scale 1, shift 0 and
the unbiased variance; `kept` rounds what goes down, and drops ties with the last. For CIFAR-10 it
takes 20 rounds of 5 draws of 10 inputs a class; the paper 100 rounds for larger data sets.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dop_fast.criteria._chunks import flat
from dop_fast.engine import Precision, gradients
from dop_fast.errors import DataError
from dop_fast.models import prunable
from dop_fast.seeding import derive
from dop_fast.types import Batches, Loss, Scores

NEEDS_DATA = False
ROUNDS = 20
REVIVES = False
VARIANTS = ("clean", "published")


class Draw(NamedTuple):
    """Inputs [n 3 h w], and by parameter name the dense weights and their perturbations."""

    inputs: Tensor
    weights: dict[str, Tensor]
    noise: dict[str, Tensor]


def score(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    seed: int,
    *,
    image: tuple[int, ...] = (),
    draws: int = 5,
    samples: int = 100,
    epsilon: float = 0.01,
    mask: Mapping[str, Tensor] | None = None,
    variant: str = "clean",
    precision: Precision = "exact",
) -> Scores:
    """Return the scores at this round's `mask` over `draws` of `samples` inputs; no effect of loss.

    `image`: channels, height and width of an input; empty: those of the first batch. Raises
    `DataError` where there is neither.
    """
    weights = prunable(model)
    shape = (samples, *(image or _shape(batches)))
    left = {
        name: torch.ones_like(weight, dtype=torch.bool)
        if mask is None
        else mask[name].to(weight.device)
        for name, weight in weights.items()
    }
    pair = _Pair(model, published=variant == "published")
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for index in range(draws):
        stream = derive(seed, "ntk-sap", index)
        drawn = draw(model, shape, stream, variant == "published")
        first = drawn.weights
        second = {name: first[name] + epsilon * drawn.noise[name] for name in first}
        pair.fill({name: part * left[name] for name, part in first.items()}, "first")
        pair.fill({name: part * left[name] for name, part in second.items()}, "second")
        batch = drawn.inputs, torch.zeros(samples, dtype=torch.int64)
        g = gradients(pair, [batch], _distance, precision)
        for name in total:
            slope = first[name] * g[f"first.{name}"] + second[name] * g[f"second.{name}"]
            total[name] += slope * left[name]
    return {name: value.abs_() for name, value in total.items()}


def draw(model: nn.Module, shape: tuple[int, ...], seed: int, published: bool) -> Draw:
    """Return a draw on the model's device, the same on every one."""
    inputs = torch.randn(shape, generator=_stream(seed, "inputs"))
    weights, noise = {}, {}
    for name, weight in prunable(model).items():
        stream = _stream(seed, name)
        dense = weight.detach()
        if published:
            new = torch.empty(dense.shape)
            nn.init.kaiming_normal_(new, generator=stream)
        else:
            order = torch.randperm(dense.numel(), generator=stream)
            new = dense.flatten()[order.to(dense.device)].view(dense.shape)
        weights[name] = new.to(dense)
        noise[name] = torch.randn(dense.shape, generator=stream).to(dense)
    return Draw(inputs.to(next(iter(weights.values()), inputs)), weights, noise)


def kept(scores: Scores, density: float) -> int:
    """Return how many weights the published code keeps of these scores."""
    values = flat(scores)
    removed = int((1 - density) * len(values))
    if not removed:
        return len(values)
    return int((values > values.kthvalue(removed).values).sum())


def _stream(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(seed, name))


def _shape(batches: Batches) -> tuple[int, ...]:
    for images, _ in batches:
        return tuple(images.shape[1:])
    raise DataError("NTK-SAP has to know the size of an input", "give image=(3, 224, 224)")


def _distance(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared distance of the two networks' outputs, side by side [n 2c]."""
    classes = outputs.shape[1] // 2
    return (outputs[:, :classes] - outputs[:, classes:]).square().sum(1).mean()


class _Pair(nn.Module):
    """Two copies of a network, whose batch norms share the statistics of the first."""

    def __init__(self, model: nn.Module, *, published: bool) -> None:
        super().__init__()
        self.first, self.second = deepcopy(model), deepcopy(model)
        self._norms: list[_SharedNorm] = []
        for name, module in list(self.first.named_modules(remove_duplicate=False)):
            if isinstance(module, _BatchNorm):
                norm = _SharedNorm(module, published)
                self._norms.append(norm)
                for copy in (self.first, self.second):
                    copy.set_submodule(name, norm)

    def fill(self, weights: Mapping[str, Tensor], which: str) -> None:
        """Set the weights of one of the two, in place."""
        with torch.no_grad():
            for name, parameter in prunable(self.get_submodule(which)).items():
                parameter.copy_(weights[name])

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs side by side, [n 2c]."""
        with torch.no_grad():
            self._measure(True)
            self.first(images)
            self._measure(False)
        return torch.cat([self.first(images), self.second(images)], dim=1)

    def _measure(self, on: bool) -> None:
        for norm in self._norms:
            norm.measuring = on


class _SharedNorm(nn.Module):
    """Batch norm that takes its statistics while `measuring`, and has them as constants after."""

    def __init__(self, norm: _BatchNorm, published: bool) -> None:
        super().__init__()
        self._eps, self._published = norm.eps, published
        self._forward_hooks.update(norm._forward_hooks)  # that scale a residual branch
        self._affine = None
        if norm.affine and not published:
            self._affine = norm.weight.detach(), norm.bias.detach()
        self.measuring = False
        self._scale = self._shift = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        """Return x [n c ...] normalised."""
        if not self.measuring:
            return x * self._scale + self._shift
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        count = x.numel() // x.shape[1]
        # as in torch, only the statistics that are kept are unbiased
        unbiased = variance * (count / max(count - 1, 1))
        shape = [1, -1, *[1] * (x.dim() - 2)]
        self._scale, self._shift = (
            part.view(shape) for part in self._line(mean, unbiased if self._published else variance)
        )
        scale, shift = self._line(mean, variance)
        return x * scale.view(shape) + shift.view(shape)

    def _line(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of normalised x = a x + b."""
        factor = (variance + self._eps).rsqrt()
        if self._affine is None:
            return factor, -mean * factor
        scale, shift = self._affine
        return factor * scale, shift - mean * factor * scale
