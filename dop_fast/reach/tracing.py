"""A forward as a list of operations: which of them the image moves through, and which weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from dop_fast.errors import ModelError
from dop_fast.models import prunable


@dataclass(frozen=True)
class Traced:
    """The operations of a forward; `names` of the placeholders, and what moves.

    `signals` depend on the image; `weights`, by the prunable weights they come from, on those
    alone.
    """

    module: fx.GraphModule
    values: list[Tensor]
    names: dict[fx.Node, str]
    signals: dict[fx.Node, None]
    weights: dict[fx.Node, str]

    def layers(self) -> dict[fx.Node, str]:
        """Return the operations in which a signal meets a weight, and the weight's name."""
        found: dict[fx.Node, str] = {}
        for node in self.signals:
            own = [self.weights[each] for each in node.all_input_nodes if each in self.weights]
            found |= {node: own[0]} if own else {}
        return found


def trace(model: nn.Module, image: Sequence[int]) -> Traced:
    """Trace a forward of one `image` [channels height width] in evaluation mode.

    Raises `ModelError` where it depends on values.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: value.detach() for name, value in state.items()}
    wanted = prunable(model)
    device = next(iter(wanted.values())).device
    names = [*state, ""]
    values = [*state.values(), torch.zeros(1, *image, device=device)]

    def run(*inputs: Tensor) -> Any:
        # copies: a forward may count what it has seen
        given = {name: value.clone() for name, value in zip(state, inputs, strict=False)}
        return functional_call(model, given, (inputs[-1],))

    with _plain(model):
        try:
            module = make_fx(functionalize(run))(*values)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"the forward cannot be traced, so paths are unknown: {reason}",
                "let it depend on the shape of the images, not on their values",
            ) from error
    named = dict(zip(module.graph.find_nodes(op="placeholder"), names, strict=True))
    signals: dict[fx.Node, None] = {}
    weights: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        inputs = [] if _is_blind(node) else node.all_input_nodes
        if named.get(node) == "" or any(each in signals for each in inputs):
            signals[node] = None
        elif named.get(node) in wanted:
            weights[node] = named[node]
        elif own := [weights[each] for each in inputs if each in weights]:
            weights[node] = own[0]
    return Traced(module, values, named, signals, weights)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode, without fused attention; afterwards it is as before."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model.eval()
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def name_of(node: fx.Node) -> str:
    """Return the bare name of an operation, `relu` for aten.relu.default."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _is_blind(node: fx.Node) -> bool:
    """Return whether an operation reads nothing of its arguments but their shape."""
    return name_of(node).startswith("new_") or name_of(node).endswith("_like")
