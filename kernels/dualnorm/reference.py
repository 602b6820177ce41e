"""Batch norm, residual and ReLU on dual numbers, and the adjoint of both halves: the mathematics.

All arrays are [rows, channels], row-major: a channels-last image batch seen as a matrix. With
y the input, and means over the rows,

    xhat = (y - mean) rstd      a = weight xhat + bias + residual      z = max(a, 0)

A tangent (R-operator, Pearlmutter 1994) is the derivative along one direction; here it moves y and
the residual, not weight and bias. Reductions are in float32, in float64 for float64 input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """Statistics of one batch and the layer's scale: each [channels], float32 (or float64)."""

    mean: Tensor
    rstd: Tensor  # 1 / sqrt(biased variance + eps)
    weight: Tensor
    eps: float

    @property
    def scale(self) -> Tensor:
        """What a normalised y is, weight included, for each unit of y."""
        return self.weight * self.rstd


def moments(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of each channel."""
    variance, mean = torch.var_mean(_wide(y), 0, correction=0)
    return mean, (variance + eps).rsqrt()


def forward(norm: Norm, y: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Return z in y's type."""
    a = _xhat(norm, y) * norm.weight + bias
    if residual is not None:
        a = a + _wide(residual)
    return (a.relu_() if relu else a).to(y.dtype)


def tangent(
    norm: Norm, y: Tensor, dy: Tensor, z: Tensor | None, dresidual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz in dy's type, and the means of dy and of xhat * dy. No z: there is no ReLU."""
    xhat, wide = _xhat(norm, y), _wide(dy)
    dmean, slope = wide.mean(0), (xhat * wide).mean(0)
    da = norm.scale * (wide - dmean - xhat * slope)
    if dresidual is not None:
        da = da + _wide(dresidual)
    return _masked(da, z).to(dy.dtype), dmean, slope


def adjoint(norm: Norm, g: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the adjoints of y and of a (the residual's) in g's type, and the mean of ga * xhat."""
    ga, xhat = _masked(_wide(g), z), _xhat(norm, y)
    b = (ga * xhat).mean(0)
    gy = norm.scale * (ga - ga.mean(0) - xhat * b)
    return gy.to(g.dtype), ga.to(g.dtype), b


def tangent_adjoint(
    norm: Norm,
    dg: Tensor,
    primal: tuple[Tensor, Tensor, Tensor | None],
    dy: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the tangents of gy and ga in dg's type.

    `primal` is (y, gy, z), `sums` the (dmean, slope) that `tangent` returned and the b of
    `adjoint`. Nothing divides by the weight, which may be zero: what `adjoint` read is expressed
    through what it wrote.
    """
    (y, gy, z), (dmean, slope, b) = primal, sums
    dga, xhat, wide_gy = _masked(_wide(dg), z), _xhat(norm, y), _wide(gy)
    dxhat = norm.rstd * (_wide(dy) - dmean - xhat * slope)
    # the mean of xhat * dxhat: zero but for eps
    cross = norm.eps * norm.rstd**3 * slope
    db = norm.scale * ((dga * xhat).mean(0) + b * cross) + (wide_gy * dxhat).mean(0)
    dgy = norm.scale * (dga - dga.mean(0) - dxhat * b) - norm.rstd * slope * wide_gy - xhat * db
    return dgy.to(dg.dtype), dga.to(dg.dtype)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _xhat(norm: Norm, y: Tensor) -> Tensor:
    return (_wide(y) - norm.mean) * norm.rstd


def _masked(values: Tensor, z: Tensor | None) -> Tensor:
    return values if z is None else values * (z > 0)
