"""Operations that are linear: views, sums, means, average pooling, concatenation."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Size, Tensor

from dop_fast.engine.tape import Operation, Rule, Slope, Tape

aten = torch.ops.aten


class Linear(Operation):
    """Its adjoint is also its adjoint's tangent.

    `forward` takes the inputs' tangents, `backward` the output's adjoint.
    """

    curved = False

    def __init__(
        self,
        tape: Tape,
        inputs: Sequence[Tensor],
        result: Tensor,
        forward: Callable[[Sequence[Slope]], Slope],
        backward: Callable[[Tensor], Sequence[Slope]],
    ) -> None:
        nodes = [tape.node(x) for x in inputs]
        super().__init__(nodes, tape, result)
        self.output.plain = all(node is None or node.plain for node in nodes)
        self._forward, self._backward = forward, backward

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        return self._backward(g)

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        return None if all(d is None for d in dx) else self._forward(dx)

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        return [None] * len(self.inputs) if dg is None else self._backward(dg)


class Sum(Linear):
    """The sum of two tensors of one shape."""


def _of_one(back: Callable[..., Tensor], forward: Callable[..., Tensor] | None = None) -> Rule:
    """Make the rule of f(x, *args) from its adjoint, back(g, x's shape, *args)."""

    def rule(
        tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> Sequence[Operation] | None:
        x, *rest = args
        if any(tape.node(value) is not None for value in rest):
            return None
        shape, run = x.shape, forward or func
        return [
            Linear(
                tape,
                [x],
                result,
                lambda dx: run(dx[0], *rest, **kwargs),
                lambda g: [back(g, shape, *rest)],
            )
        ]

    return rule


def _spread(g: Tensor, shape: Size, dims: Sequence[int] | None, keepdim: bool) -> Tensor:
    """Undo a sum over `dims`: repeat along them."""
    dims = range(len(shape)) if not dims else [dim % len(shape) for dim in dims]
    ones = [1 if dim in dims else size for dim, size in enumerate(shape)]
    return g.reshape(ones).expand(shape)


def _mean_back(
    g: Tensor, shape: Size, dims: Sequence[int] | None = None, keepdim: bool = False
) -> Tensor:
    return _spread(g, shape, dims, keepdim) * (g.numel() / prod(shape))


def _sum_back(
    g: Tensor, shape: Size, dims: Sequence[int] | None = None, keepdim: bool = False
) -> Tensor:
    return _spread(g, shape, dims, keepdim)


def _reshaped(g: Tensor, shape: Size, *args: Any) -> Tensor:
    return g.reshape(shape)


def _permuted(g: Tensor, shape: Size, dims: Sequence[int]) -> Tensor:
    back = [0] * len(dims)
    for place, dim in enumerate(dims):
        back[dim % len(dims)] = place
    return g.permute(back)


def _sum(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    """Add or subtract; either may be a constant."""
    factor = kwargs.get("alpha", 1) * (-1 if func is aten.sub.Tensor else 1)
    terms = [(x, scale) for x, scale in zip(args, (1, factor), strict=True) if _is_node(tape, x)]
    inputs = [x for x, _ in terms]
    # what the functions below hold must not be the tensors themselves, which they do not need
    parts, shape = [(x.shape, scale) for x, scale in terms], result.shape

    def forward(dx: Sequence[Slope]) -> Slope:
        scaled = [
            d if scale == 1 else d * scale
            for d, (_, scale) in zip(dx, parts, strict=True)
            if d is not None
        ]
        total = scaled[0] if len(scaled) == 1 else scaled[0] + scaled[1]
        return total if total.shape == shape else total.expand(shape)

    def backward(g: Tensor) -> Sequence[Slope]:
        return [(g if scale == 1 else g * scale).sum_to_size(like) for like, scale in parts]

    plain = parts == [(shape, 1), (shape, 1)]
    return [(Sum if plain else Linear)(tape, inputs, result, forward, backward)]


def _is_node(tape: Tape, value: Any) -> bool:
    return tape.node(value) is not None


def _joined(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> Sequence[Operation] | None:
    tensors, dim = list(args[0]), args[1] if len(args) > 1 else 0
    sizes = [x.shape[dim] if x.numel() else 0 for x in tensors]
    if 0 in sizes:
        return None

    def forward(dx: Sequence[Slope]) -> Slope:
        known = next(d for d in dx if d is not None)
        shapes = [(*result_shape[:dim], size, *result_shape[dim:][1:]) for size in sizes]
        return torch.cat(
            [known.new_zeros(s) if d is None else d for d, s in zip(dx, shapes, strict=True)], dim
        )

    result_shape, dim = result.shape, dim % result.dim()
    return [Linear(tape, tensors, result, forward, lambda g: torch.split(g, sizes, dim))]


def _averaged(
    g: Tensor,
    shape: Size,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor:
    slope: Tensor = aten.avg_pool2d_backward(
        g, _blank(g, shape), kernel, stride, padding, ceil_mode, count_include_pad, divisor
    )
    return slope


def _max_pool(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Operation]:
    """Max pooling picks the same elements whatever the direction."""
    x, kernel, *rest = args
    defaults: list[Any] = [[], 0, 1, False]
    stride, padding, dilation, ceil = [*rest, *defaults[len(rest) :]]
    values, indices = result
    shape = x.shape

    def forward(dx: Sequence[Slope]) -> Slope:
        d = dx[0]
        assert d is not None
        return _from_rows(_rows(d).gather(1, _rows(indices)), indices.shape)

    def backward(g: Tensor) -> Sequence[Slope]:
        geometry = kernel, stride, padding, dilation, ceil
        g = g.contiguous(memory_format=torch.channels_last)
        return [aten.max_pool2d_with_indices_backward(g, _blank(g, shape), *geometry, indices)]

    return [Linear(tape, [x], values, forward, backward)]


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _from_rows(rows: Tensor, shape: Size) -> Tensor:
    return rows.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _blank(g: Tensor, shape: Size) -> Tensor:
    """Return a tensor for a function that reads only its shape."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)


_RESHAPE = _of_one(_reshaped, lambda dx, size, *rest: dx.reshape(size))
RULES: dict[Any, Rule] = {
    aten.view.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.t.default: _of_one(lambda g, shape: g.t()),
    aten.transpose.int: _of_one(lambda g, shape, a, b: g.transpose(a, b)),
    aten.permute.default: _of_one(_permuted),
    aten.expand.default: _of_one(lambda g, shape, size: g.sum_to_size(shape)),
    aten.unsqueeze.default: _of_one(_reshaped),
    aten.squeeze.dim: _of_one(_reshaped),
    aten.squeeze.dims: _of_one(_reshaped),
    aten.clone.default: _of_one(lambda g, shape: g),
    aten.select.int: _of_one(lambda g, shape, *at: aten.select_backward(g, shape, *at)),
    aten.slice.Tensor: _of_one(
        lambda g, shape, dim=0, start=None, end=None, step=1: aten.slice_backward(
            g, shape, dim, start or 0, shape[dim] if end is None else end, step
        )
    ),
    aten.mean.dim: _of_one(_mean_back),
    aten.sum.dim_IntList: _of_one(_sum_back),
    aten.mul.Scalar: _of_one(lambda g, shape, factor: g * factor),
    aten.div.Scalar: _of_one(lambda g, shape, divisor: g / divisor),
    aten.div.Tensor: _of_one(lambda g, shape, divisor: (g / divisor).sum_to_size(shape)),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.cat.default: _joined,
    aten.avg_pool2d.default: _of_one(_averaged),
    aten._adaptive_avg_pool2d.default: _of_one(
        lambda g, shape, size: aten._adaptive_avg_pool2d_backward(g, _blank(g, shape))
    ),
    aten.max_pool2d_with_indices.default: _max_pool,
}
