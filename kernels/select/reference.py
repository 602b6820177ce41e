"""Selection by a partition of all scores, copied together on the CPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dop_fast.kernels import bits


class UnorderedError(ValueError):
    """A score that has no place in the order; `layer` is the index of its tensor."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"a score in tensor {layer} has no place in the order")
        self.layer = layer


def top(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return where the k largest scores are, `bits.pack`ed; of equal ones the first.

    First in the list, then in the flattened tensor. Raises `UnorderedError` for NaN.
    """
    for layer, score in enumerate(scores):
        if bool(score.isnan().any()):
            raise UnorderedError(layer)
    joined = torch.cat([score.detach().flatten() for score in scores])
    values = joined.to("cpu", torch.promote_types(joined.dtype, torch.float32)).numpy()
    # a partition, not a top-k: which of equal values a top-k takes depends on the device
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    keep = values > threshold
    equal = np.flatnonzero(values == threshold)
    keep[equal[: k - int(keep.sum())]] = True
    kept = torch.from_numpy(keep).to(joined.device)
    masks = torch.split(kept, [score.numel() for score in scores])
    return [bits.pack(mask) for mask in masks]
