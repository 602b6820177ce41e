"""A forward pass, recorded as operations that know their derivatives up to the second.

The recorder sits below autograd and sees what PyTorch really runs, so any model works. An
operation without a rule of its own is derived by autograd, on its own, exactly (`generic`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, get_ident
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dop_fast import threads

Slope: TypeAlias = Tensor | None
"""A derivative; None is zero."""


def add(a: Slope, b: Slope, *, fresh: bool = False) -> Slope:
    """Return the sum of two derivatives; `fresh`: in the memory of the first."""
    if a is None or b is None:
        return a if b is None else b
    return a.add_(b) if fresh and a.dtype == b.dtype else a + b


class Unsupported(Exception):
    """The forward does something that a tape cannot follow."""


class Kept:
    """What a tensor held when an operation asked to keep it."""

    __slots__ = ("exact", "low")

    def __init__(self) -> None:
        self.exact: Slope = None
        self.low: Slope = None

    @property
    def value(self) -> Tensor:
        return self.exact if self.low is None else self.low  # type: ignore[return-value]


class Node(Kept):
    """A tensor that depends on the weights; `plain`: it is a weight, or a view of one."""

    __slots__ = ("dgrad", "grad", "plain", "tangent")

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.tangent: Slope = None
        self.grad: Slope = None
        self.dgrad: Slope = None


class Operation:
    """One step of the forward; an input that is None is a constant.

    `adjoint` returns the adjoints of the inputs from that of the output, those at least that are
    `wanted`. `tangent` returns the output's tangent from the inputs' (R-operator).
    `tangent_adjoint` returns the tangents of what `adjoint` returned, given the tangent dg and
    the value g of the output's adjoint, and the inputs' tangents; it is called after `tangent`
    and `adjoint`. `curved`: it reads g, which is there. `fresh`: the adjoints that it returns are
    in memory that nothing else uses.
    """

    curved = True
    fresh = False

    def __init__(
        self,
        inputs: Sequence[Node | None],
        tape: "Tape",
        result: Tensor,
        kept: Sequence[Kept] = (),
    ) -> None:
        self.inputs, self.kept, self.output = tuple(inputs), tuple(kept), tape.new(result)
        self.reached = False  # by the sweep of the adjoint
        # not the tape: a ring of references would hold a chunk's memory until it is found
        self._low = tape.low

    @property
    def value(self) -> Tensor:
        return self.kept[0].value

    def _lower(self, slope: Tensor) -> Tensor:
        """Return an adjoint or a tangent in the type that operands are multiplied in."""
        return slope if self._low is None else slope.to(self._low)

    def adjoint(self, g: Tensor, wanted: Sequence[bool]) -> Sequence[Slope]:
        raise NotImplementedError

    def tangent(self, dx: Sequence[Slope]) -> Slope:
        raise NotImplementedError

    def tangent_adjoint(self, dg: Slope, g: Tensor, dx: Sequence[Slope]) -> Sequence[Slope]:
        raise NotImplementedError

    def saved(self) -> Iterator[Tensor]:
        """Yield what is held between the sweeps."""
        held = [slot for kept in self.kept for slot in (kept.exact, kept.low)]
        yield from (tensor for tensor in (*held, self.output.grad) if tensor is not None)

    def release(self) -> None:
        """Forget what `adjoint` left for `tangent_adjoint`."""


class Tape:
    """The operations of one forward, in order.

    `low` is the type in which values, tangents and adjoints are kept and multiplied, where that
    is not the forward's own.
    """

    def __init__(self, low: torch.dtype | None = None) -> None:
        self.operations: list[Operation] = []
        self.low = low
        self._nodes: Any = WeakIdKeyDictionary()
        self._views: Any = WeakIdKeyDictionary()

    def node(self, tensor: Any) -> Node | None:
        """Return the node of a tensor, None for constants."""
        return self._nodes.get(tensor) if isinstance(tensor, Tensor) else None

    def new(self, tensor: Tensor, *, plain: bool = False) -> Node:
        """Make a tensor a node; it replaces what the same tensor was before."""
        self._nodes[tensor] = node = Node(plain)
        return node

    def keep(self, tensor: Tensor, *, exact: bool = False) -> Kept:
        """Return what will give this tensor's present value later, in `low` unless `exact`."""
        kept = self.node(tensor) or Kept()
        if exact or self.low is None or not tensor.is_floating_point():
            kept.exact = tensor
        elif kept.low is None:
            kept.low = tensor.to(self.low)
        return kept

    def before_writing(self, tensor: Tensor, *, whole: bool) -> Tensor:
        """Return the tensor as it is before an operation in place; `whole`: with its values."""
        storage = tensor.untyped_storage().data_ptr()
        if any(other == storage for other in self._views.values()):
            raise Unsupported("an operation in place on a view, or on what has views")
        node = self.node(tensor)
        kept = node is not None and node.exact is tensor
        old = tensor.clone() if whole or kept else tensor.detach()
        if node is not None:
            self._nodes[old] = node
            if kept:
                node.exact = old
        return old

    def viewed(self, tensor: Tensor) -> None:
        self._views[tensor] = tensor.untyped_storage().data_ptr()


Rule: TypeAlias = Callable[
    [Tape, Any, tuple[Any, ...], Mapping[str, Any], Any], Sequence[Operation] | None
]
"""From tape, function, arguments and result to operations; None: the rule does not fit."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes what runs within it onto a tape: by `rules`, else by `generic`.

    Functions that are `blind` have derivatives that do not read their first argument; some run
    as others do, `instead`.
    """

    def __init__(
        self,
        tape: Tape,
        rules: Mapping[Any, Rule],
        generic: Rule,
        *,
        blind: Sequence[Any],
        instead: Mapping[Any, Callable[..., Any]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.rules, self.generic = tape, rules, generic
        self.blind, self.instead = blind, instead

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        threads.go_on()
        kwargs = kwargs or {}
        active = any(self.tape.node(leaf) for leaf in tree_leaves((args, kwargs)))
        # what a model computes without gradients is a constant of its derivative
        if not active or not torch.is_grad_enabled() or _is_constant(func):
            result = func(*args, **kwargs)
            if func.is_view and isinstance(result, Tensor):
                self.tape.viewed(result)
            return result
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tape, before = self.tape, args
        if func._schema.is_mutable and func not in _WRITES_BUFFERS:
            func_, func = func, _functional(func)
            before = (tape.before_writing(args[0], whole=func not in self.blind), *args[1:])
            result = func_(*args, **kwargs)
        else:
            result = self.instead.get(func, func)(*args, **kwargs)
        rule = self.rules.get(func, self.generic)
        operations = rule(tape, func, before, kwargs, result)
        if operations is None:
            operations = self.generic(tape, func, before, kwargs, result)
        tape.operations.extend(operations or ())
        if func.is_view:
            for view in tree_leaves(result):
                tape.viewed(view)
        return result


_WRITES_BUFFERS = (
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._batch_norm_with_update.default,
)


def _is_constant(func: Any) -> bool:
    """Return whether the result does not depend on the values of the arguments' elements."""
    name: str = func._schema.name.removeprefix("aten::")
    return name == "detach" or name.startswith("new_") or name.endswith("_like")


def _functional(func: Any) -> Any:
    """Return `relu` for `relu_`; raise `Unsupported` where there is none."""
    name, written = func._schema.name.removeprefix("aten::"), func._schema.arguments[0].alias_info
    others = [argument.alias_info for argument in func._schema.arguments[1:]]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    found = getattr(packet, func._overloadname, None)
    if found is None or written is None or any(others):
        raise Unsupported(f"{name} writes into its arguments")
    return found


_APPLY = Function.__dict__["apply"]
_recording: set[int] = set()
"""The threads that refuse custom functions; others still call them."""
_change = Lock()


@contextmanager
def no_custom_functions() -> Iterator[None]:
    """Refuse torch.autograd.Function, whose backward a recorder below autograd does not see."""
    with _change:
        _recording.add(get_ident())
        Function.apply = classmethod(_apply)
    try:
        yield
    finally:
        with _change:
            _recording.remove(get_ident())
            if not _recording:
                Function.apply = _APPLY


def _apply(cls: type, /, *args: object, **kwargs: object) -> Any:
    if get_ident() in _recording:
        raise Unsupported(f"{cls.__name__} has a backward of its own")
    return _APPLY.__get__(None, cls)(*args, **kwargs)
