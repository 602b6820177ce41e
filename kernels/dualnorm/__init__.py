"""Batch norm, residual and ReLU on dual numbers: see `reference` for the mathematics."""

from dop_fast.kernels.dualnorm.reference import (
    Norm,
    adjoint,
    forward,
    moments,
    tangent,
    tangent_adjoint,
)

__all__ = ["Norm", "adjoint", "forward", "moments", "tangent", "tangent_adjoint"]
