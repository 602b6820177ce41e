"""The layers and weights that we look at, in networks of any kind."""

import copy
import difflib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from dop_fast.errors import ModelError

POOLING = (_MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions, linear layers and attention, shared ones once.

    By parameter name, in the order of `named_parameters`; biases and norms are not among them.
    """
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            wanted.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            wanted.update(id(getattr(module, projection)) for projection in projections)
    return {name: weight for name, weight in model.named_parameters() if id(weight) in wanted}


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module called `name`; ModelError with the nearest names if there is none."""
    modules: dict[str, nn.Module] = {key: part for key, part in model.named_modules() if key}
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, 3) or [key for key, _ in model.named_children()]
    raise ModelError(f"the network has no layer {name!r}", f"nearest: {', '.join(near)}")


def twin(model: nn.Module) -> nn.Module:
    """Return the network for another thread: modules of its own, with the same tensors.

    Raises ModelError where they cannot be copied.
    """
    shared = {id(value): value for value in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the network cannot be copied for a second thread: {error}",
            "work on one: set OMP_NUM_THREADS=1",
        ) from error


def bottleneck(model: nn.Module, example: Tensor) -> str:
    """Return the name of the penultimate layer, seen in a forward of `example` [n 3 h w].

    It is the last module before the last layer with weights whose output is a map, [n c h w] or
    [n h w c] or [n tokens c], of more than one position. Pooling and modules that run twice do
    not count; of modules with the same output the outermost does. A network without maps gives
    the module whose output enters its last linear layer. Raises ModelError.
    """
    calls = _forward_calls(model, example)
    runs = Counter(call.name for call in calls)
    heads = [i for i, call in enumerate(calls) if isinstance(call.module, _ConvNd | nn.Linear)]
    last = heads[-1] if heads else 0
    once = [call for call in calls[:last] if runs[call.name] == 1]
    maps = [
        call
        for call in once
        if _is_map(call.output, len(example)) and not isinstance(call.module, POOLING)
    ]
    if not once:
        raise ModelError("the network has no layer before its last one", "set [teacher] layer")
    entering = [call for call in once if call.output is calls[last].input]
    chosen = (maps or entering or once)[-1]
    same = [call.name for call in once if call.output is chosen.output]
    return min(same, key=lambda name: name.count("."))  # the first of the outermost


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    input: object
    output: object


def _forward_calls(model: nn.Module, example: Tensor) -> list[_Call]:
    """Return the calls of a forward in eval mode, in order of completion, but the root's."""
    calls: list[_Call] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        calls.append(_Call(name, module, inputs[0] if inputs else None, output))

    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model.eval()(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"the network does not take images of {list(example.shape[1:])}: {error}",
            "change [data] size or the architecture",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return calls


def _is_map(output: object, images: int) -> bool:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != images:
        return False
    # channels first or last: either way more than one position leaves two sides above 1
    return sum(side > 1 for side in output.shape[1:]) > 1
