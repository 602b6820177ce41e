"""What a mask leaves of a network: the weights on a path from its input to its output.

A weight that is kept but gets no signal, or whose signal reaches no output, is as good as
removed: effective sparsity counts it too (Vysogorets and Kempe, 2023). Found on the network that
really runs, at the size of its images: its forward is traced into operations, which are followed
with zeros and ones once forward and once backward, at every channel and pixel. Taps of a kernel
that only ever see padding are therefore on no path.

Exact for convolutions of any kind, linear layers, pooling, activations, sums, concatenation and
what moves values about. By definition, biases, constants and the statistics of normalisation
begin and make no path. Of a product of two signals (attention, squeeze and excitation) either
passes even where the other is absent, and an operation without a rule passes everything on: so
weights may be called alive that are not, never the other way round.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.reach.rules import Call, Moving, everything, rule_of
from dop_fast.reach.tracing import Traced, name_of, trace


@dataclass(frozen=True)
class Reach:
    """What a mask leaves of a network.

    `alive`: the kept weights that lie on a path. `outputs`: numbers that the network puts out for
    an image, `reached` of them depend on it. `cut`: where no output is reached, the layers at
    which every path ends. `guessed`: operations without a rule, which may hide dead weights.
    """

    alive: MaskSet
    outputs: int
    reached: int
    cut: tuple[str, ...]
    guessed: tuple[str, ...]

    @property
    def collapsed(self) -> bool:
        """Return whether the output does not depend on the input any more."""
        return not self.reached

    @cached_property
    def dead(self) -> tuple[str, ...]:
        """Return the layers without a weight on a path."""
        return tuple(row.name for row in self.alive.layers() if not row.kept)


def follow(model: nn.Module, mask_set: MaskSet, image: Sequence[int]) -> Reach:
    """Find the weights on a path; `image` is [channels height width], weights' values count not.

    Prunable weights without a mask count as kept. The model is left as found. Raises `ModelError`
    where the forward depends on values, so that it has no fixed paths.
    """
    traced = trace(model, image)
    kept = {
        name: mask_set.masks.get(name, torch.ones(weight.shape, dtype=torch.bool))
        for name, weight in prunable(model).items()
    }
    walk = _Walk(traced, kept)
    output = walk.forward()
    weights = list(walk.weights.values())
    slopes = torch.autograd.grad(
        output.sum(), weights, allow_unused=True, materialize_grads=True
    ) if output.requires_grad else [torch.zeros_like(weight) for weight in weights]  # fmt: skip
    alive = {name: slope > 0.5 for name, slope in zip(walk.weights, slopes, strict=True)}
    named = {name: (alive[name] & mask).cpu() for name, mask in mask_set.masks.items()}
    reached = int(output.detach().sum())
    return Reach(
        MaskSet(named, mask_set.about),
        output.numel(),
        reached,
        () if reached else walk.ends(),
        tuple(sorted(walk.guessed)),
    )


def sensitive(model: nn.Module, image: Sequence[int]) -> tuple[str, ...]:
    """Return the weights of the first layers, the last ones and the shortcuts, in model order.

    First and last: no layer comes before, none after. A shortcut is the only layer on its way to
    a sum that two or more layers lead to on the other.
    """
    traced = trace(model, image)
    before, layers = _upstream(traced), traced.layers()
    behind = set().union(*(before[node] - {node} for node in layers)) & set(layers)
    found = {layers[node] for node in layers if not (before[node] - {node}) & set(layers)}
    found |= {layers[node] for node in layers if node not in behind}
    for node in traced.signals:
        if name_of(node) != "add":
            continue
        ways = [before[way] for way in node.all_input_nodes if way in traced.signals]
        for one, other in zip(ways, ways[::-1], strict=True):
            alone, rest = (one - other) & set(layers), (other - one) & set(layers)
            if len(ways) == 2 and len(alone) == 1 and len(rest) > 1:
                found |= {layers[each] for each in alone}
    return tuple(name for name in prunable(model) if name in found)


def _upstream(traced: Traced) -> dict[fx.Node, set[fx.Node]]:
    """Return for each signal the layers that it comes through, itself among them."""
    layers = traced.layers()
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in traced.signals:
        ways = [found[each] for each in node.all_input_nodes if each in found]
        found[node] = set().union(*ways) | ({node} if node in layers else set())
    return found


class _Saturate(torch.autograd.Function):
    """Zeros and ones again, forward and backward, so that nothing grows with depth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0.5).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return (slopes[0] > 0.5).to(torch.float32)


class _Walk(fx.Interpreter):
    """Runs the traced operations by their rules."""

    def __init__(self, traced: Traced, kept: dict[str, Tensor]) -> None:
        super().__init__(traced.module, garbage_collect_values=True)
        self.traced, self.guessed, self.empty = traced, set[str](), set[fx.Node]()
        self.weights = {
            name: mask.to(traced.values[0].device, torch.float32).requires_grad_()
            for name, mask in kept.items()
        }

    def forward(self) -> Tensor:
        """Return where the output is reached, all outputs flat."""
        found = self.run(*self.traced.values)
        return torch.cat([part.flatten() for part in tree_leaves(found) if part is not None])

    def ends(self) -> tuple[str, ...]:
        """Return the layers at which the signal ends, seen from an output that nothing reaches."""
        layers, found = self.traced.layers(), set()
        (last,) = self.traced.module.graph.find_nodes(op="output")
        waiting, seen = deque(last.all_input_nodes), set(last.all_input_nodes)
        while waiting:
            node = waiting.popleft()
            inputs = [each for each in node.all_input_nodes if each in self.traced.signals]
            if node in layers and not any(each in self.empty for each in inputs):
                found.add(layers[node])
            fresh = [each for each in inputs if each in self.empty and each not in seen]
            seen.update(fresh)
            waiting.extend(fresh)
        return tuple(name for name in self.weights if name in found)

    def run_node(self, n: fx.Node) -> Any:
        traced = self.traced
        if n.op == "placeholder":
            value = super().run_node(n)
            if n in traced.weights:
                return self.weights[traced.names[n]]
            return torch.ones_like(value, dtype=torch.float32) if n in traced.signals else value
        if n.op == "output" or name_of(n) == "getitem":
            found = super().run_node(n)
        elif n in traced.signals or n in traced.weights:
            found = tree_map(_saturated, self._passed(n))
        else:
            with torch.no_grad():
                return super().run_node(n)
        parts = [part for part in tree_leaves(found) if isinstance(part, Tensor)]
        if n in traced.signals and not any(bool(part.any()) for part in parts):
            self.empty.add(n)
        return found

    def _passed(self, n: fx.Node) -> Any:
        def marked(node: fx.Node) -> Any:
            value = self.env[node]
            moves = node in self.traced.signals or node in self.traced.weights
            if not moves or not isinstance(value, Tensor):
                return value
            return Moving(value, node in self.traced.weights)

        args, kwargs = map_arg(n.args, marked), map_arg(n.kwargs, marked)
        call = Call(n.target, tuple(args), dict(kwargs), n.meta["val"])
        rule = rule_of(name_of(n))
        if rule is None:
            self.guessed.add(name_of(n))
            return everything(call)
        return rule(call)


def _saturated(value: Any) -> Any:
    return _Saturate.apply(value) if isinstance(value, Tensor) else value
