"""Convolutions on a CPU that also add and clip, so that an activation is passed over once."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

ADDITIONS = (operator.add, operator.iadd, torch.add)
CLIPS = (functional.relu, torch.relu)


class Fused(nn.Module):
    """relu(convolution(x) + other) in bfloat16 by oneDNN; `other` may be left out.

    Where it fits, `other` gives its memory to the result, so nobody may need it afterwards.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        self.about: Any = (
            convolution.padding, convolution.stride, convolution.dilation, convolution.groups
        )  # fmt: skip

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return relu(convolution(x) + other), [n c h w]."""
        weight, bias = self.convolution.weight, self.convolution.bias
        x = x.to(weight.dtype)
        if other is None:
            made = torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, *self.about, "relu", [], ""
            )
        elif self._fits(x, other):
            made = torch.ops.mkldnn._convolution_pointwise_.binary(
                other, x, weight, bias, *self.about, "add", 1.0, "relu", [], ""
            )
        else:
            made = torch.relu(self.convolution(x) + other)
        result: Tensor = made
        return result

    def _fits(self, x: Tensor, other: Tensor) -> bool:
        padding, stride, dilation, _ = self.about
        sides = (
            (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
            for i, kernel in enumerate(self.convolution.kernel_size)
        )
        return (
            other.shape == (len(x), self.convolution.out_channels, *sides)
            and other.dtype == x.dtype
            and other.is_contiguous(memory_format=torch.channels_last)
        )


def available() -> bool:
    """Return whether this build of torch has oneDNN's fused convolutions."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_convolution_pointwise_"
    )


def fuse(network: fx.GraphModule) -> None:
    """Fuse convolutions, in bfloat16, with the ReLU or the addition and ReLU behind them."""
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if _is(node, modules, nn.Identity):  # where a batch norm was folded
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    order = {node: place for place, node in enumerate(network.graph.nodes)}
    for clip in list(order):
        if not (_is(clip, modules, nn.ReLU) or clip.target in CLIPS):
            continue
        parts = _before(clip, order, modules)
        if parts is None:
            continue
        convolution, other = parts
        name = str(convolution.target)
        if not isinstance(network.get_submodule(name), Fused):
            network.set_submodule(name, Fused(modules[name]))
        with network.graph.inserting_before(clip):
            x = convolution.args[0]
            made = network.graph.call_module(name, (x, other) if other else (x,))
        order[made] = order[clip]
        middle = clip.args[0]
        clip.replace_all_uses_with(made)
        for node in dict.fromkeys((clip, middle, convolution)):
            network.graph.erase_node(node)
    network.recompile()


def _before(
    clip: fx.Node, order: dict[fx.Node, int], modules: dict[str, nn.Module]
) -> tuple[fx.Node, fx.Node | None] | None:
    """Return the convolution whose output is clipped, and what is added to it, if they fuse."""
    source = clip.args[0]
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return None
    if _fusible(source, modules):
        return source, None
    if source.target not in ADDITIONS or len(source.args) != 2 or source.kwargs:
        return None
    terms = [term for term in source.args if isinstance(term, fx.Node)]
    terms.sort(key=order.__getitem__)
    if len(set(terms)) < 2 or not _fusible(terms[1], modules) or len(terms[1].users) > 1:
        return None
    other = terms[0]
    # memory of its own that nobody looks at during the convolution, or after it
    free = (
        _is(other, modules, nn.Conv2d)
        and other is not terms[1].args[0]
        and max(order[user] for user in other.users) == order[source]
    )
    return (terms[1], other) if free else None


def _fusible(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not _is(node, modules, nn.Conv2d) or len(node.args) != 1 or node.kwargs:
        return False
    convolution = modules[str(node.target)]
    calls = sum(other.target == node.target for other in node.graph.nodes)
    return (
        calls == 1
        and getattr(convolution, "padding_mode", "") == "zeros"
        and isinstance(convolution.padding, tuple)
        and convolution.weight.dtype == torch.bfloat16
    )


def _is(node: fx.Node, modules: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is kind
