"""A network cut in two behind its bottleneck layer: what leads to it, and what follows."""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from dop_fast.concepts.folding import UNTRACEABLE


def split(model: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Return the trunk, from images to the output of `layer`, and the head, from there to logits.

    They share the weights of `model`. None for a network that `torch.fx` cannot follow, or where
    a path leads around the layer, so that its output does not give the logits.
    """
    watch = _Watch(layer)
    try:
        graph = watch.trace(model)
    except UNTRACEABLE:
        return None
    output, behind = watch.output, False
    if output is None:
        return None
    trunk, head = fx.Graph(), fx.Graph()
    before: dict[fx.Node, fx.Node] = {}
    after = {output: head.placeholder("activation")}
    for node in graph.nodes:
        if not behind:
            before[node] = trunk.node_copy(node, before.__getitem__)
        elif any(past in before and past is not output for past in node.all_input_nodes):
            return None
        else:
            after[node] = head.node_copy(node, after.__getitem__)
        behind = behind or node is output
    trunk.output(before[output])
    return fx.GraphModule(model, trunk), fx.GraphModule(model, head)


class _Watch(fx.Tracer):
    """Remembers the node of a layer's last output."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.output: fx.Node | None = None

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        if self.path_of_module(m) == self.layer:
            self.output = output.node if isinstance(output, fx.Proxy) else None
        return output


def cast(trunk: fx.GraphModule) -> fx.GraphModule:
    """Return a copy whose convolutions and linear layers hold the bfloat16 that autocast makes."""
    made = copy.deepcopy(trunk)
    called = {str(node.target) for node in made.graph.nodes if node.op == "call_module"}
    for name in called:
        module = made.get_submodule(name)
        if isinstance(module, _ConvNd) or type(module) is nn.Linear:
            module.to(torch.bfloat16)
    return made
