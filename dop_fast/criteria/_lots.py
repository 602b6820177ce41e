"""Random places in layers whose shares a rule sets: r / u, u a lot and r the layer's claim.

Of such scores a global threshold t keeps the weights with u < r / t, that is, in each layer a
share proportional to its claim, or all of it where that is above 1, and the share of the others
rises to make up for it. So the sparsity need not be known, and masks are nested.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dop_fast.models import prunable
from dop_fast.seeding import derive


def lots(
    model: nn.Module, seed: int, criterion: str, *, independent: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield for each prunable weight the values (i + 1/2) / n in random order, in its shape.

    Shares are so rounded to counts by Webster's method, which favours neither large layers nor
    small ones. `independent`: uniform draws in (0, 1] instead. On the CPU, a stream a layer, then
    put on the weight's device.
    """
    for name, weight in prunable(model).items():
        generator = torch.Generator().manual_seed(derive(seed, criterion, name))
        count = weight.numel()
        if independent:
            drawn = 1 - torch.rand(count, generator=generator, dtype=torch.float32)
        else:
            order = torch.randperm(count, generator=generator, dtype=torch.int32)
            drawn = order.double().add_(0.5).div_(count).float()
        yield name, drawn.view(weight.shape).to(weight.device)
