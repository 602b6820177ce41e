"""Recording a forward, and the sweeps over what was recorded: adjoint, tangent, both at once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dop_fast import threads
from dop_fast.engine import curves, linear, norms, products
from dop_fast.engine.curves import Rectifier
from dop_fast.engine.generic import generic
from dop_fast.engine.linear import Sum
from dop_fast.engine.norms import BatchNorm
from dop_fast.engine.tape import Node, Operation, Recorder, Slope, Tape, add, no_custom_functions

RULES = {**products.RULES, **linear.RULES, **curves.RULES, **norms.RULES}
# what these compute their derivatives from is not their first argument
BLIND = (torch.ops.aten.relu.default, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


class Recording:
    """The forward of one chunk, as a function of the weights."""

    def __init__(
        self,
        run: Callable[[], Tensor],
        weights: Mapping[str, Tensor],
        low: torch.dtype | None = None,
    ) -> None:
        """Run `run`, whose result is a scalar, and record what depends on the weights.

        Raises `Unsupported` where the forward cannot be followed.
        """
        tape = Tape(low)
        self._leaves = {name: tape.new(weight, plain=True) for name, weight in weights.items()}
        with (
            no_custom_functions(),
            Recorder(tape, RULES, generic, blind=BLIND, instead=norms.INSTEAD),
        ):
            value = run()
        self._end, self._one = tape.node(value) or Node(), torch.ones_like(value)
        self._operations = fused(_reaching(tape.operations, self._end))
        self._kept = False

    @torch.no_grad()
    def gradient(self, *, keep: bool) -> dict[str, Slope]:
        """Return the gradient by each weight; `keep` what `products` would compute again."""
        self._sweep(adjoint=True, tangent=False, keep=keep)
        self._kept = keep
        return {name: _take(leaf, "grad") for name, leaf in self._leaves.items()}

    @torch.no_grad()
    def products(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Slope]]:
        """Return the Hessian's product with each vector, which has a part for each weight."""
        products = []
        for left, vector in zip(reversed(range(len(vectors))), vectors, strict=True):
            for name, leaf in self._leaves.items():
                leaf.tangent = vector[name]
            for operation in self._operations:
                threads.go_on()
                operation.output.tangent = operation.tangent(_tangents(operation))
            self._sweep(adjoint=not self._kept, tangent=True, keep=left > 0)
            self._kept = left > 0
            products.append({name: _take(leaf, "dgrad") for name, leaf in self._leaves.items()})
        return products

    def saved_bytes(self) -> int:
        """Return how much memory holds values and adjoints between the sweeps."""
        held = {}
        for operation in self._operations:
            for tensor in operation.saved():
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def _sweep(self, *, adjoint: bool, tangent: bool, keep: bool) -> None:
        """Go from the end to the weights with the adjoint, its tangent, or both.

        With the tangent, the adjoint of the weights themselves is left out: it is known.
        """
        if adjoint:
            self._end.grad = self._one
        for operation in reversed(self._operations):
            threads.go_on()
            output = operation.output
            if adjoint:
                operation.reached = output.grad is not None or output.plain
            if adjoint and output.grad is not None:
                wanted = [
                    node is not None and not (tangent and node.plain) for node in operation.inputs
                ]
                slopes = operation.adjoint(output.grad, wanted)
                for node, slope, want in zip(operation.inputs, slopes, wanted, strict=True):
                    if want and node is not None:
                        node.grad = add(slope, node.grad, fresh=operation.fresh)
            if tangent and operation.reached:
                # what is not curved may find no adjoint: it does not look at it
                slopes = operation.tangent_adjoint(
                    output.dgrad,
                    output.grad,  # type: ignore[arg-type]
                    _tangents(operation),
                )
                for node, slope in zip(operation.inputs, slopes, strict=True):
                    if node is not None:
                        node.dgrad = add(slope, node.dgrad, fresh=operation.fresh)
            if tangent:
                output.dgrad = output.tangent = None
            if not (keep and operation.curved):
                output.grad = None
            if not keep:
                operation.release()


def _tangents(operation: Operation) -> list[Slope]:
    return [None if node is None else node.tangent for node in operation.inputs]


def _take(node: Node, what: str) -> Slope:
    slope: Slope = getattr(node, what)
    setattr(node, what, None)
    return slope


def _reaching(operations: list[Operation], end: Node) -> list[Operation]:
    """Return the operations that the end depends on."""
    needed, found = {end}, []
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(node for node in operation.inputs if node is not None)
            found.append(operation)
    return found[::-1]


def fused(operations: list[Operation]) -> list[Operation]:
    """Let each batch norm do the residual addition and the ReLU that are all its result is for."""
    uses = Counter(node for operation in operations for node in operation.inputs)
    made_by: dict[Node | None, Operation] = {
        operation.output: operation for operation in operations
    }
    done: list[Operation | None] = []
    place = {}
    for operation in operations:
        place[operation] = len(done)
        done.append(operation)
        chain = _absorbed(operation, made_by, uses)
        if chain:
            norm, others = chain
            for other in others:
                norm.absorb(other)
                done[place[other]] = None
            done[place[norm]] = None
            done[-1], place[norm] = norm, len(done) - 1
    return [operation for operation in done if operation is not None]


def _absorbed(
    operation: Operation, made_by: Mapping[Node | None, Operation], uses: Counter[Node | None]
) -> tuple[BatchNorm, list[Sum | Rectifier]] | None:
    """Return norm and ReLU, or norm, sum and ReLU, where `operation` ends such a chain."""
    if not isinstance(operation, Rectifier):
        return None
    source = operation.inputs[0]
    before = made_by.get(source) if uses[source] == 1 else None
    if isinstance(before, BatchNorm) and len(before.kept) == 1:
        return before, [operation]
    if isinstance(before, Sum):
        for node in reversed(before.inputs):
            norm = made_by.get(node) if uses[node] == 1 else None
            if isinstance(norm, BatchNorm) and norm.bare:
                return norm, [before, operation]
    return None
