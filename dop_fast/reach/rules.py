"""Which outputs of an operation depend on which of its inputs, computed with zeros and ones.

A value is 1 where something arrives from the network's input, else 0; a weight is 1 where it is
kept. An operation then sums what can reach each output: the sum is 0 where nothing does. Sums
are counts of at least 1, and never cancel, so that a threshold at one half is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Rule: TypeAlias = Callable[["Call"], Any]


class Moving:
    """An argument that depends on the network's input, or on masked weights alone (`weight`)."""

    __slots__ = ("value", "weight")

    def __init__(self, value: Tensor, weight: bool) -> None:
        self.value, self.weight = value, weight


@dataclass(frozen=True)
class Call:
    """One operation: arguments are `Moving` or constants; `result` is one like its own."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def shape(self) -> torch.Size:
        """Shape of the output, of the first one where there are several."""
        first: Tensor = tree_leaves(self.result)[0]
        return first.shape

    def moving(self) -> list[Moving]:
        """Return the arguments that move, in order."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Moving)]

    def option(self, position: int, name: str, default: Any) -> Any:
        """Return an argument by position or else by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


def rule_of(name: str) -> Rule | None:
    """Return the rule of an aten operation; None where there is none: take `everything`."""
    return _RULES.get(name.rstrip("_"))


def everything(call: Call) -> Any:
    """Let every output depend on every input: never too little."""
    total = torch.stack([each.value.sum() for each in call.moving()]).sum()
    return tree_map(lambda each: total.expand(each.shape), call.result)


def _passed(call: Call) -> Tensor:
    """Return what comes in, each element for itself; normalisation's statistics are no path."""
    return call.moving()[0].value


def _first_of_three(call: Call) -> tuple[Tensor, None, None]:
    return _passed(call), None, None


def _any(call: Call) -> Tensor:
    """Return where any of the arguments arrives; constants bring nothing."""
    total = sum((each.value for each in call.moving()), torch.zeros(()))
    return total.expand(call.shape)


def _times(call: Call) -> Tensor:
    """Return where a weight meets what it multiplies; of two signals either may pass."""
    if len({each.weight for each in call.moving()}) < 2:
        return _any(call)
    one, other = (each.value for each in call.moving())
    return one * other


def _moved(call: Call) -> Any:
    """Return what the operation itself does to zeros and ones, constants being zero."""

    def plain(value: Any) -> Any:
        if isinstance(value, Moving):
            return value.value
        numbers = isinstance(value, Tensor) and value.is_floating_point()
        return torch.zeros_like(value, dtype=torch.float32) if numbers else value

    args, kwargs = tree_map(plain, (call.args, call.kwargs))
    return call.function(*args, **kwargs)


def _viewed(call: Call) -> Tensor:
    return _passed(call).reshape(call.shape)


def _strided(call: Call) -> Any:
    """Return what has the same shape but another memory layout; else the places are unknown."""
    x = _passed(call)
    return x if x.shape == call.shape else everything(call)


def _chosen(call: Call) -> Any:
    return _any(call) if isinstance(call.args[0], Moving) else _moved(call)


def _padded(call: Call) -> Tensor:
    x: Tensor = call.args[0].value
    return F.pad(x, call.args[1])


def _summed(call: Call) -> Tensor:
    x = _passed(call)
    dims = call.option(1, "dim", None)
    keep = bool(call.option(2, "keepdim", False))
    whole = dims is None or dims == []
    return x.sum(tuple(range(x.ndim)) if whole else dims, keep)


def _best(call: Call) -> tuple[Tensor, None]:
    return _summed(call), None


def _window(call: Call, dilation: Sequence[int]) -> Tensor:
    x, kernel = _passed(call), list(call.args[1])
    stride = list(call.option(2, "stride", ())) or kernel
    pad = list(call.option(3, "padding", (0,)))
    n = len(kernel)
    pad, dilation = (list(values) * (n if len(values) == 1 else 1) for values in (pad, dilation))
    margins = []
    for i in reversed(range(n)):  # whatever ceil_mode says: as many windows as there really are
        span = (call.shape[i - n] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        margins += [pad[i], span - x.shape[i - n] - pad[i]]
    padded = F.pad(x, margins)
    ones = torch.ones(1, 1, *kernel, device=x.device)
    planes = padded.reshape(-1, 1, *padded.shape[-n:])
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[n - 1]
    summed: Tensor = convolve(planes, ones, None, stride, 0, dilation)
    return summed.reshape(call.shape)


def _averaged(call: Call) -> Tensor:
    return _window(call, (1,))


def _maximum(call: Call) -> tuple[Tensor, None]:
    return _window(call, call.option(4, "dilation", (1,))), None


def _adaptive(call: Call) -> Tensor:
    x, size = _passed(call), call.args[1]
    pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
    mean: Tensor = pool(x, size)
    return mean * math.prod(x.shape[-len(size) :])


def _adaptive_maximum(call: Call) -> tuple[Tensor, None]:
    return _adaptive(call), None


def _product(factors: Sequence[Any], multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return where a bilinear operation passes: a weight where it stays, of two signals either.

    Constants are taken to pass.
    """

    def full(value: Any) -> Tensor:
        tensor = value.value if isinstance(value, Moving) else value
        return torch.ones_like(tensor, dtype=torch.float32)

    a, b = factors
    signals = [isinstance(x, Moving) and not x.weight for x in (a, b)]
    if all(signals):
        return multiply(a.value, full(b)) + multiply(full(a), b.value)
    left, right = (x.value if isinstance(x, Moving) else full(x) for x in (a, b))
    return multiply(left, right)


def _convolved(call: Call) -> Tensor:
    x, weight, _, *how = call.args
    return _product((x, weight), lambda a, b: torch.convolution(a, b, None, *how))


def _multiplied(call: Call) -> Tensor:
    return _product(call.args[:2], torch.matmul)


def _added_product(call: Call) -> Tensor:
    added, *factors = call.args[:3]
    made = _product(factors, torch.matmul)
    return made + added.value if isinstance(added, Moving) and not added.weight else made


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "relu relu6 hardtanh gelu silu hardswish hardsigmoid sigmoid log_sigmoid tanh elu celu "
            "leaky_relu softplus mish _prelu_kernel threshold clamp clamp_min clamp_max abs exp "
            "log sqrt rsqrt pow neg reciprocal erf sin cos _softmax _log_softmax _safe_softmax "
            "clone detach alias _to_copy contiguous masked_fill lift_fresh lift_fresh_copy "
            "channel_dropout positive"
        ).split(),
        _passed,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm "
            "native_layer_norm native_group_norm _native_batch_norm_legit native_dropout"
        ).split(),
        _first_of_three,
    ),
    **dict.fromkeys("add sub rsub maximum minimum div".split(), _any),
    "mul": _times,
    **dict.fromkeys(
        (
            "permute transpose t expand squeeze unsqueeze slice select "
            "split split_with_sizes unbind cat stack roll flip index index_select "
            "repeat slice_scatter select_scatter pixel_shuffle pixel_unshuffle channel_shuffle "
            "upsample_nearest2d reflection_pad2d replication_pad2d copy "
            "native_channel_shuffle movedim unfold"
        ).split(),
        _moved,
    ),
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias".split(), _viewed),
    "as_strided": _strided,
    "where": _chosen,
    "constant_pad_nd": _padded,
    **dict.fromkeys("sum mean amax logsumexp".split(), _summed),
    "max": _best,
    "avg_pool2d": _averaged,
    "avg_pool3d": _averaged,
    "max_pool2d_with_indices": _maximum,
    "max_pool3d_with_indices": _maximum,
    "_adaptive_avg_pool2d": _adaptive,
    "_adaptive_avg_pool3d": _adaptive,
    "adaptive_max_pool2d": _adaptive_maximum,
    "convolution": _convolved,
    **dict.fromkeys("mm bmm mv dot matmul".split(), _multiplied),
    **dict.fromkeys("addmm baddbmm".split(), _added_product),
}
