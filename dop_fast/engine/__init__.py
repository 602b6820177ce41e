"""The scoring engine: derivatives of the mean loss by the prunable weights, exact.

Gradients and Hessian-vector products by an explicit R-operator (Pearlmutter, 1994) over the
recorded forward. All are of the mean over all samples: a chunk's mean counts by the chunk's size.
(The published GraSP code gives every chunk the same weight, so images of a short last chunk count
for more.) Batch norm takes its statistics over a chunk; everything else is in evaluation mode,
so that dropout is off and both passes of a Hessian product see one function.

Equal calls give equal bits on one device with the same versions. On a CPU each chunk is one
thread's, see `threads`: among several of them convolutions would split their sums. Ranks that call
alike share the chunks, and each gets the result. The bits are those of one thread and one rank.

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
