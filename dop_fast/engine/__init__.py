"""The scoring engine: derivatives of the mean loss by the prunable weights, exact.

Gradients and Hessian-vector products by an explicit R-operator (Pearlmutter, 1994) over the
recorded forward. All are of the mean over all samples: a chunk's mean counts by the chunk's size.
(The published GraSP code gives every chunk the same weight, so images of a short last chunk count
for more.) Batch norm takes its statistics over a chunk; everything else is in evaluation mode,
so that dropout is off and both passes of a Hessian product see one function.

Equal calls give equal bits on one device with the same versions and as many PyTorch threads, among
which convolutions split their sums. So nothing here or in kernels may change that number. Ranks
that call alike share the chunks, and each gets the result: the same bits for any number of them.

Finite differences are no substitute: at ReLUs they see kinks that the Hessian does not.
"""

from dop_fast.engine.derivatives import (
    Precision,
    gradients,
    hessian_gradient,
    hessian_products,
    samples_that_fit,
)

__all__ = ["Precision", "gradients", "hessian_gradient", "hessian_products", "samples_that_fit"]
