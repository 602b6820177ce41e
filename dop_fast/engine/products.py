"""Convolutions and matrix products: linear in each of two operands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dop_fast.engine.tape import Operation, Slope, Tape, add

aten = torch.ops.aten
Arguments: TypeAlias = tuple[Any, ...]


class Product(NamedTuple):
    """p(a, b) and its adjoints: left(g, b, a) is a's, right(a, g, b) is b's.

    The adjoints read only the shape of their last argument, whose value they do not depend on.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    left: Callable[[Tensor, Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor, Tensor], Tensor]


class Bilinear(Operation):
    """A product of two operands, of which either may be a constant."""

    fresh = True

    def __init__(
        self, tape: Tape, operands: tuple[Tensor, Tensor], result: Tensor, product: Product
    ) -> None:
        nodes, kept = map(tape.node, operands), map(tape.keep, operands)
        super().__init__(tuple(nodes), tape, result, tuple(kept))
        self._product = product

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        a, b = (kept.value for kept in self.kept)
        g = self._lower(g)
        return (
            self._product.left(g, b, a) if wanted[0] else None,
            self._product.right(a, g, b) if wanted[1] else None,
        )

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        a, b = (kept.value for kept in self.kept)
        da, db = (self._lowered(d) for d in dx)
        return add(
            None if da is None else self._product.of(da, b),
            None if db is None else self._product.of(a, db),
            fresh=True,
        )

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        a, b = (kept.value for kept in self.kept)
        g, dg = self._lower(g), self._lowered(dg)
        da, db = (self._lowered(d) for d in dx)
        left, right = self._product.left, self._product.right
        slopes: list[Slope] = [None, None]
        if self.inputs[0] is not None:
            slopes[0] = add(
                None if dg is None else left(dg, b, a),
                None if db is None else left(g, db, a),
                fresh=True,
            )
        if self.inputs[1] is not None:
            slopes[1] = add(
                None if dg is None else right(a, dg, b),
                None if da is None else right(da, g, b),
                fresh=True,
            )
        return slopes

    def _lowered(self, slope: Slope) -> Slope:
        return None if slope is None else self._lower(slope)


def _convolution(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    x, w, bias, *geometry = args
    if tape.node(bias) is not None:
        return None

    def backward(g: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        wanted = [which == 0, which == 1, False]
        slopes: list[Tensor] = aten.convolution_backward(g, x, w, None, *geometry, wanted)
        return slopes[which]

    product = Product(
        lambda x, w: aten.convolution(x, w, None, *geometry),
        lambda g, w, x: backward(g, x, w, 0),
        lambda x, g, w: backward(g, x, w, 1),
    )
    return [Bilinear(tape, (x, w), result, product)]


MATRIX = Product(
    torch.matmul,
    lambda g, b, a: g @ b.transpose(-1, -2),
    lambda a, g, b: a.transpose(-1, -2) @ g,
)
ELEMENTWISE = Product(
    torch.mul,
    lambda g, b, a: (g * b).sum_to_size(a.shape),
    lambda a, g, b: (a * g).sum_to_size(b.shape),
)


def _matrix(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    return [Bilinear(tape, (args[0], args[1]), result, MATRIX)]


def _biased_matrix(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    bias, a, b = args
    if tape.node(bias) is not None or kwargs:
        return None
    return [Bilinear(tape, (a, b), result, MATRIX)]


def _elementwise(
    tape: Tape, func: Any, args: Arguments, kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    if not isinstance(args[1], Tensor):
        return None
    return [Bilinear(tape, (args[0], args[1]), result, ELEMENTWISE)]


RULES = {
    aten.convolution.default: _convolution,
    aten.mm.default: _matrix,
    aten.bmm.default: _matrix,
    aten.addmm.default: _biased_matrix,
    aten.mul.Tensor: _elementwise,
}
