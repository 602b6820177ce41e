"""Batch norm with the residual addition and the ReLU behind it, layer norm and group norm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from dop_fast.engine.curves import Rectifier
from dop_fast.engine.linear import Sum
from dop_fast.engine.tape import Operation, Rule, Slope, Tape, add
from dop_fast.kernels import dualnorm

aten = torch.ops.aten


class BatchNorm(Operation):
    """Batch norm by the batch's statistics, then `inputs[1]` added, then ReLU, where there are any.

    Its adjoint's tangent is made from what the adjoint returned, not from the adjoint it read.
    """

    curved = False

    def __init__(self, tape: Tape, x: Tensor, norm: dualnorm.Norm, result: Tensor) -> None:
        super().__init__([tape.node(x)], tape, result, [tape.keep(x)])
        self._norm = norm
        self._sums: list[Tensor] = []
        self._gx: Slope = None
        self._b: Slope = None

    def absorb(self, other: Sum | Rectifier) -> None:
        """Do what the next operation does too: a `Sum` with another tensor, or a `Rectifier`."""
        if isinstance(other, Rectifier):
            self.kept += other.kept
        else:
            self.inputs = self.inputs[0], next(x for x in other.inputs if x is not self.output)
        self.output = other.output

    def _rectified(self) -> Slope:
        return rows(self.kept[1].value) if len(self.kept) > 1 else None

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        x = self.value
        self._gx, ga, self._b = dualnorm.adjoint(
            self._norm, rows(self._lower(g)), rows(x), self._rectified()
        )
        return [unrows(slope, x.shape) for slope in (self._gx, ga)][: len(self.inputs)]

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        x = self.value
        residual = None if len(dx) == 1 or dx[1] is None else rows(self._lower(dx[1]))
        dz, *self._sums = dualnorm.tangent(
            self._norm, rows(x), self._or_zero(dx[0]), self._rectified(), residual
        )
        return unrows(dz, x.shape)

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        x = self.value
        assert self._gx is not None and self._b is not None
        slopes = dualnorm.tangent_adjoint(
            self._norm,
            self._or_zero(dg),
            (rows(x), self._gx, self._rectified()),
            self._or_zero(dx[0]),
            (self._sums[0], self._sums[1], self._b),
        )
        return [unrows(slope, x.shape) for slope in slopes][: len(self.inputs)]

    def release(self) -> None:
        self._gx = None

    @property
    def bare(self) -> bool:
        return len(self.kept) == 1 and len(self.inputs) == 1

    def _or_zero(self, slope: Slope) -> Tensor:
        x = self.value
        return rows(torch.zeros_like(x) if slope is None else self._lower(slope))


class GroupedNorm(Operation):
    """Layer norm and group norm: every group of `size` elements of x by its own statistics."""

    def __init__(
        self, tape: Tape, x: Tensor, result: Tensor, scale: Tensor | None, size: int, eps: float
    ) -> None:
        super().__init__([tape.node(x)], tape, result, [tape.keep(x, exact=True)])
        self._scale, self._size, self._eps = scale, size, eps

    @property
    def _x(self) -> Tensor:
        return self.kept[0].exact  # type: ignore[return-value]

    def _xhat(self) -> tuple[Tensor, Tensor]:
        x = self._groups(self._x)
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        rstd = (variance + self._eps).rsqrt()
        return (x - mean) * rstd, rstd

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        (xhat, rstd), u = self._xhat(), self._groups(self._scaled(g))
        return [self._shaped(rstd * _centred(u, xhat))]

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        if dx[0] is None:
            return None
        (xhat, rstd), d = self._xhat(), self._groups(dx[0])
        return self._scaled(self._shaped(rstd * _centred(d, xhat)))

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        straight = None if dg is None else self.adjoint(dg, [True])[0]
        if dx[0] is None:
            return [straight]
        (xhat, rstd), u = self._xhat(), self._groups(self._scaled(g))
        d = self._groups(dx[0])
        slope, b = _mean(xhat * d), _mean(u * xhat)
        dxhat = rstd * _centred(d, xhat)
        bent = dxhat * b + xhat * _mean(u * dxhat) + rstd * slope * _centred(u, xhat)
        return [add(straight, self._shaped(-rstd * bent))]

    def _groups(self, values: Tensor) -> Tensor:
        return values.reshape(-1, self._size)

    def _shaped(self, groups: Tensor) -> Tensor:
        return groups.reshape(self._x.shape)

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self._scale is None else values * self._scale


def _mean(values: Tensor) -> Tensor:
    return values.mean(1, keepdim=True)


def _centred(values: Tensor, xhat: Tensor) -> Tensor:
    """Take the parts along 1 and along xhat out of values."""
    return values - _mean(values) - xhat * _mean(values * xhat)


def rows(x: Tensor) -> Tensor:
    """See [n c ...] as a matrix [n ..., c], row-major; a view of a channels-last x."""
    if x.dim() == 2:
        return x.contiguous()
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def unrows(matrix: Tensor, shape: Size) -> Tensor:
    """Undo `rows`."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _batch_norm(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Operation] | None:
    x, weight, bias, _, _, training, _, eps = args
    if not training or tape.node(weight) is not None or tape.node(bias) is not None:
        return None
    y, mean, rstd, *_ = result
    scale = torch.ones_like(mean) if weight is None else weight
    return [BatchNorm(tape, x, dualnorm.Norm(mean, rstd, scale, eps), y)]


def _layer_norm(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Operation] | None:
    x, shape, weight, bias, eps = args
    if tape.node(weight) is not None or tape.node(bias) is not None:
        return None
    return [GroupedNorm(tape, x, result[0], weight, math.prod(shape), eps)]


def _group_norm(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Operation] | None:
    x, weight, bias, _, channels, positions, groups, eps = args
    if tape.node(weight) is not None or tape.node(bias) is not None:
        return None
    scale = None if weight is None else weight.reshape(channels, *[1] * (x.dim() - 2))
    return [GroupedNorm(tape, x, result[0], scale, channels * positions // groups, eps)]


def _normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Run a batch norm. PyTorch's sums of a channels-last batch are less accurate on a CPU.

    Running statistics stay as they are.
    """
    if not training:
        return aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    mean, rstd = dualnorm.moments(rows(x), eps)
    scale = torch.ones_like(mean) if weight is None else weight.detach()
    shift = torch.zeros_like(mean) if bias is None else bias.detach()
    norm = dualnorm.Norm(mean, rstd, scale, eps)
    return unrows(dualnorm.forward(norm, rows(x), shift, None, False), x.shape), mean, rstd


INSTEAD = dict.fromkeys(
    (
        aten.native_batch_norm.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    ),
    _normalised,
)
RULES: dict[Any, Rule] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.cudnn_batch_norm.default: _batch_norm,
    aten.miopen_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}
