"""Activations, softmax and max pooling: operations of one tensor that are not linear in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dop_fast.engine.tape import Operation, Rule, Slope, Tape, add

aten = torch.ops.aten
Derive: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
Arguments: TypeAlias = tuple[Any, ...]


class Rectifier(Operation):
    """max(x, 0), which has no curvature; reads the sign of its result."""

    curved = False

    def __init__(self, tape: Tape, x: Tensor, result: Tensor) -> None:
        super().__init__([tape.node(x)], tape, result)
        self.kept = (tape.keep(result),)

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        return [torch.where(self.value > 0, g, 0)]

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        return None if dx[0] is None else self.adjoint(dx[0], [True])[0]

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        return [None] if dg is None else self.adjoint(dg, [True])


class Pointwise(Operation):
    """A smooth function of each element, given its first and second derivative."""

    def __init__(
        self, tape: Tape, x: Tensor, result: Tensor, derive: Derive
    ) -> None:  # fmt: skip
        super().__init__([tape.node(x)], tape, result, [tape.keep(x)])
        self._derive = derive

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        return [g * self._derive(self.value)[0]]

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        return None if dx[0] is None else self.adjoint(dx[0], [True])[0]

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        first, second = self._derive(self.value)
        bent = None if dx[0] is None else second * dx[0] * g
        straight = None if dg is None else first * dg
        return [add(bent, straight)]


class Softmax(Operation):
    """Softmax along a dimension, or its logarithm; kept exact, for its errors grow."""

    def __init__(self, tape: Tape, x: Tensor, result: Tensor, dim: int, *, log: bool) -> None:
        super().__init__([tape.node(x)], tape, result)
        self.kept = (tape.keep(result, exact=True),)
        self._dim, self._log = dim, log

    def _p(self) -> Tensor:
        y: Tensor = self.kept[0].exact  # type: ignore[assignment]
        return y.exp() if self._log else y

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        p = self._p()
        if self._log:
            return [g - p * g.sum(self._dim, keepdim=True)]
        return [p * (g - (p * g).sum(self._dim, keepdim=True))]

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        if dx[0] is None:
            return None
        p, d = self._p(), dx[0]
        mean = (p * d).sum(self._dim, keepdim=True)
        return d - mean if self._log else p * (d - mean)

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        straight = None if dg is None else self.adjoint(dg, [True])[0]
        if dx[0] is None:
            return [straight]
        p, d, dim = self._p(), dx[0], self._dim
        dp = p * (d - (p * d).sum(dim, keepdim=True))
        if self._log:
            bent = -dp * g.sum(dim, keepdim=True)
        else:
            means = (p * g).sum(dim, keepdim=True), (dp * g).sum(dim, keepdim=True)
            bent = dp * (g - means[0]) - p * means[1]
        return [add(bent, straight)]


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    density = (x.square() * -0.5).exp_() * (1 / math.sqrt(2 * math.pi))
    return torch.special.ndtr(x) + x * density, density * (2 - x.square())


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = x.sigmoid()
    bend = s * (1 - s)
    return s + x * bend, bend * (2 + x * (1 - 2 * s))


def _between(low: float, high: float, slope: float = 1.0) -> Derive:
    """Derive a ramp, which is straight between its corners."""

    def derive(x: Tensor) -> tuple[Tensor, Tensor]:
        return ((x > low) & (x < high)).to(x.dtype) * slope, torch.zeros_like(x)

    return derive


def _hardswish(x: Tensor) -> tuple[Tensor, Tensor]:
    inside = ((x > -3) & (x < 3)).to(x.dtype)
    return torch.where(x < 3, inside * (x / 3 + 0.5), 1), inside / 3


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    s = x.sigmoid()
    bend = s * (1 - s)
    return bend, bend * (1 - 2 * s)


def _pointwise(derive: Derive) -> Rule:
    def rule(
        tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
    ) -> Sequence[Operation] | None:
        if kwargs or len(args) > 1:
            return None
        return [Pointwise(tape, args[0], result, derive)]

    return rule


def _clamp(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation]:
    low, high = [*map(float, args[1:]), *(-1.0, 1.0)[len(args) - 1 :]]
    return [Pointwise(tape, args[0], result, _between(low, high))]


def _rectifier(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation]:
    return [Rectifier(tape, args[0], result)]


def _softmax(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation]:
    log = func is aten._log_softmax.default
    return [Softmax(tape, args[0], result, args[1], log=log)]


RULES: dict[Any, Rule] = {
    aten.relu.default: _rectifier,
    aten.gelu.default: _pointwise(_gelu),
    aten.silu.default: _pointwise(_silu),
    aten.sigmoid.default: _pointwise(_sigmoid),
    aten.hardswish.default: _pointwise(_hardswish),
    aten.hardsigmoid.default: _pointwise(_between(-3, 3, 1 / 6)),
    aten.hardtanh.default: _clamp,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
}
