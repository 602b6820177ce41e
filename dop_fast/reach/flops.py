"""The arithmetic of a forward, by the weights that it is done with."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from dop_fast.reach.tracing import trace


def flops(model: nn.Module, image: Sequence[int]) -> Counter[str]:
    """Return the FLOPs of one image [channels height width] by prunable weight; "" has the rest.

    As `torch.utils.flop_counter` counts: of convolutions and matrix products, and two for each
    multiplication and addition. Raises `ModelError` where the forward depends on values.
    """
    traced = trace(model, image)
    layers, found = traced.layers(), Counter[str]()
    for node in traced.module.graph.nodes:
        found[layers.get(node, "")] += _count(node)
    return found


def _count(node: fx.Node) -> int:
    count = flop_registry.get(getattr(node.target, "_overloadpacket", None))
    if count is None:
        return 0

    def value(each: fx.Node) -> Any:
        return each.meta["val"]

    args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
    found: int = count(*args, **kwargs, out_val=node.meta["val"])
    return found
