"""Any operation that has no rule: derived by autograd, exactly, one operation at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from dop_fast.engine.tape import Kept, Operation, Slope, Tape, add


class Generic(Operation):
    """One result of a function, which runs again wherever a derivative is needed.

    Second derivatives are by double backward, which more functions have than forward mode.
    """

    def __init__(
        self, tape: Tape, func: Any, arguments: tuple[Any, Any], results: Sequence[Any], index: int
    ) -> None:
        leaves, self._tree = tree_flatten(arguments)
        active = [i for i, leaf in enumerate(leaves) if tape.node(leaf) is not None]
        inputs = [tape.node(leaves[i]) for i in active]
        self._func, self._active, self._index = func, active, index
        self._leaves = [
            tape.keep(leaf, exact=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        kept = [leaf for leaf in self._leaves if isinstance(leaf, Kept)]
        super().__init__(inputs, tape, results[index], kept)

    def _run(self) -> tuple[list[Tensor], Tensor]:
        leaves: list[Any] = [
            leaf.exact if isinstance(leaf, Kept) else leaf for leaf in self._leaves
        ]
        inputs = [leaves[i].detach().requires_grad_() for i in self._active]
        for i, value in zip(self._active, inputs, strict=True):
            leaves[i] = value
        args, kwargs = tree_unflatten(leaves, self._tree)
        results = tree_flatten(self._func(*args, **kwargs))[0]
        return inputs, results[self._index]

    @torch.enable_grad()
    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        inputs, result = self._run()
        return _slopes(result, inputs, g)

    @torch.enable_grad()
    def tangent(self, dx: Sequence[Slope]) -> Slope:
        inputs, result = self._run()
        u = torch.zeros_like(result, requires_grad=True)
        # the adjoint is linear in u: its own adjoint is the tangent
        return _slopes(_dot(_slopes(result, inputs, u, create_graph=True), dx), [u])[0]

    @torch.enable_grad()
    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        inputs, result = self._run()
        bent = _slopes(_dot(_slopes(result, inputs, g, create_graph=True), dx), inputs)
        if dg is None:
            return bent
        return [add(a, b) for a, b in zip(bent, _slopes(result, inputs, dg), strict=True)]


def generic(
    tape: Tape, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> list[Operation]:
    """Return an operation for each result that has a derivative."""
    results = tree_flatten(result)[0]
    return [
        Generic(tape, func, (args, dict(kwargs)), results, index)
        for index, value in enumerate(results)
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


def _dot(slopes: Sequence[Slope], dx: Sequence[Slope]) -> Slope:
    parts = [
        (slope * d.to(slope.dtype)).sum()
        for slope, d in zip(slopes, dx, strict=True)
        if slope is not None and d is not None and slope.requires_grad
    ]
    return torch.stack(parts).sum() if parts else None


def _slopes(
    value: Slope, inputs: Sequence[Tensor], g: Slope = None, *, create_graph: bool = False
) -> Sequence[Slope]:
    if value is None or not value.requires_grad:
        return [None] * len(inputs)
    weight = None if g is None else g.to(value.dtype)
    return torch.autograd.grad(
        value, inputs, weight, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
