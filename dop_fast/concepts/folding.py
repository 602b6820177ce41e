"""Batch norms folded into the convolutions before them: fewer passes over every activation."""

from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# what a forward raises on being shown placeholders instead of tensors
UNTRACEABLE = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, LookupError,
    AssertionError,
)  # fmt: skip


def fold(model: nn.Module, layer: str) -> None:
    """Fold batch norms of `model`, in eval mode, in place; the output of `layer` stays the same.

    A network whose forward depends on values, so that `torch.fx` cannot follow it, stays as it is.
    """
    for convolution, norm in _pairs(model):
        if _within(convolution, layer) and not _within(norm, layer):
            continue  # the layer's output is that before the norm
        parts: list[Any] = [model.get_submodule(name) for name in (convolution, norm)]
        model.set_submodule(convolution, fuse_conv_bn_eval(*parts))
        model.set_submodule(norm, nn.Identity())


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return convolutions and the norms that alone see their outputs, each called once."""
    try:
        calls = [node for node in fx.Tracer().trace(model).nodes if node.op == "call_module"]
    except UNTRACEABLE:
        return []
    modules = dict(model.named_modules())
    targets = [str(node.target) for node in calls]
    found = []
    for node, name in zip(calls, targets, strict=True):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        convolution = str(before.target)
        # of exactly these types: a parametrised convolution computes its weights
        plain = type(modules[convolution]) in CONVOLUTIONS and type(modules[name]) in NORMS
        known = getattr(modules[name], "running_mean", None) is not None
        if plain and known and targets.count(convolution) == targets.count(name) == 1:
            found.append((convolution, name))
    return found


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")
