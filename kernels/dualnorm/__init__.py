"""Batch norm, residual and ReLU on dual numbers: see `reference` for the mathematics.

Float32 and bfloat16 in contiguous rows go through compiled kernels, Numba's on a CPU, Triton's on
CUDA, which autograd does not see; anything else goes through `reference`. `out` gives memory for
results, of the type and shape that the function returns. It may be that of an argument which is
not needed any more: z over y or the residual, dz over dy, ga over g, dga over dg, dgy over gy.
Without z, ga is g and dga is dg.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from dop_fast.kernels.dualnorm import cpu, reference
from dop_fast.kernels.dualnorm.reference import Norm

__all__ = ["Norm", "adjoint", "forward", "moments", "reference", "tangent", "tangent_adjoint"]

Pair: TypeAlias = "tuple[Tensor | None, Tensor | None]"
Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
FAST = (torch.float32, torch.bfloat16)


def moments(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of each channel, float32; of float64 in float64."""
    made: tuple[Tensor, Tensor] = (_kernels((), y) or reference).moments(y, eps)
    return made


def forward(
    norm: Norm,
    y: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return z in y's type; see `reference.forward`."""
    if kernels := _kernels((*_vectors(norm), bias), y, residual, out):
        z: Tensor = kernels.forward(norm, y, bias, residual, relu, _new(out, y))
        return z
    return _into(out, reference.forward(norm, y, bias, residual, relu))


def tangent(
    norm: Norm,
    y: Tensor,
    dy: Tensor,
    z: Tensor | None,
    dresidual: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Triple:
    """Return dz in dy's type, and the means of dy and of xhat * dy; see `reference.tangent`."""
    if kernels := _kernels(_vectors(norm), y, dy, z, dresidual, out):
        made: Triple = kernels.tangent(norm, y, dy, z, dresidual, _new(out, dy))
        return made
    dz, dmean, slope = reference.tangent(norm, y, dy, z, dresidual)
    return _into(out, dz), dmean, slope


def adjoint(
    norm: Norm, g: Tensor, y: Tensor, z: Tensor | None, *, out: Pair = (None, None)
) -> Triple:
    """Return gy and ga in g's type, and the mean of ga * xhat; see `reference.adjoint`."""
    if kernels := _kernels(_vectors(norm), g, y, z, *out):
        made: Triple = kernels.adjoint(norm, g, y, z, _both(out, g, z))
        return made
    gy, ga, b = reference.adjoint(norm, g, y, z)
    return _into(out[0], gy), g if z is None else _into(out[1], ga), b


def tangent_adjoint(
    norm: Norm,
    dg: Tensor,
    primal: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    *,
    out: Pair = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return the tangents of gy and ga in dg's type; see `reference.tangent_adjoint`."""
    z = primal[2]
    if kernels := _kernels((*_vectors(norm), *sums), dg, *primal, dy, *out):
        both = _both(out, dg, z)
        made: tuple[Tensor, Tensor] = kernels.tangent_adjoint(norm, dg, primal, dy, sums, both)
        return made
    dgy, dga = reference.tangent_adjoint(norm, dg, primal, dy, sums)
    return _into(out[0], dgy), dg if z is None else _into(out[1], dga)


def _kernels(vectors: tuple[Tensor, ...], first: Tensor, *others: Tensor | None) -> Any:
    """Return the module that can take these vectors and arrays, None if there is none."""
    arrays = (first, *(x for x in others if x is not None))
    if first.dim() != 2 or not first.numel() or first.device.type not in ("cpu", "cuda"):
        return None
    for x in arrays:
        if x.dtype not in FAST or x.shape != first.shape or not x.is_contiguous():
            return None
    for x in vectors:
        if x.dtype != torch.float32 or x.shape != first.shape[1:] or not x.is_contiguous():
            return None
    if any(x.device != first.device for x in (*arrays, *vectors)):
        return None
    if not first.is_cuda:
        return cpu
    from dop_fast.kernels.dualnorm import gpu

    return gpu


def _vectors(norm: Norm) -> tuple[Tensor, ...]:
    return norm.mean, norm.rstd, norm.weight


def _new(out: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty_like(like) if out is None else out


def _both(out: Pair, g: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return memory for gy and ga, which without a mask is g."""
    return _new(out[0], g), g if z is None else _new(out[1], g)


def _into(out: Tensor | None, made: Tensor) -> Tensor:
    return made if out is None else out.copy_(made)
