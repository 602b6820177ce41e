"""A network and its mask, written as one file."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from dop_fast import masks, models
from dop_fast.errors import ConfigError, ModelError
from dop_fast.interop import fours
from dop_fast.masks import MaskSet
from dop_fast.reach.flops import flops
from dop_fast.workspace import EXPORTS


@dataclass(frozen=True)
class Exported:
    """What was written, and what it can save.

    `parameters` of the network, `kept` of them, `dense_bytes` they take without a mask. FLOPs are
    of one image, the sparse ones if each removed weight's were left out; None where the forward
    cannot be traced. `difference`: of ONNX, the largest one of two runtimes' logits, relative to
    the largest logit; None where it was not checked. `speedups`: see `fours`, where a GPU can.
    """

    path: Path
    bytes: int
    dense_bytes: int
    parameters: int
    kept: int
    flops: int | None
    sparse_flops: int | None
    difference: float | None = None
    speedups: Mapping[str, float] = field(default_factory=dict)


def export(
    path: str | Path, model: nn.Module, mask_set: MaskSet, kind: str, image: Sequence[int]
) -> Exported:
    """Write the masked model to `path`; the model itself stays as it is.

    `image`: channels, height and width of an input. Raises `ConfigError` for a kind that is not
    one of `workspace.EXPORTS`, `ModelError` where the mask is not of this model or a check fails.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"there is no kind {kind!r} of file", f"one of: {', '.join(EXPORTS)}")
    path = Path(path)
    network = deepcopy(model).cpu().eval()
    masks.apply_(network, mask_set)
    path.parent.mkdir(parents=True, exist_ok=True)
    difference = None
    if kind == "onnx":
        from dop_fast.interop import graphs  # needs onnx

        difference = graphs.write(path, network, mask_set, image)
    else:
        WRITERS[kind](path, network, mask_set)
    parameters = list(network.parameters())
    total = sum(value.numel() for value in parameters)
    dense_flops, sparse_flops = _flops(network, mask_set, image)
    return Exported(
        path,
        path.stat().st_size,
        sum(value.nbytes for value in parameters),
        total,
        total - mask_set.total + mask_set.kept,
        dense_flops,
        sparse_flops,
        difference,
        fours.speedups(network, mask_set) if fours.available() else {},
    )


def _flops(
    network: nn.Module, mask_set: MaskSet, image: Sequence[int]
) -> tuple[int, int] | tuple[None, None]:
    try:
        counts = flops(network, image)
    except ModelError:  # the file is whole: only its arithmetic is not known
        return None, None
    densities = {row.name: row.density for row in mask_set.layers()}
    kept = sum(count * densities.get(name, 1) for name, count in counts.items())
    return sum(counts.values()), round(kept)


def _dense(path: Path, network: nn.Module, mask_set: MaskSet) -> None:
    models.save_tensors(path, network.state_dict(), _about(mask_set, "dense"))


def _prune(path: Path, network: nn.Module, mask_set: MaskSet) -> None:
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if name in mask_set.masks:
            state[f"{name}_orig"] = value
            state[f"{name}_mask"] = mask_set.masks[name].to(value.dtype)
        else:
            state[name] = value
    models.save_tensors(path, state, _about(mask_set, "prune"))


def _csr(path: Path, network: nn.Module, mask_set: MaskSet) -> None:
    state = dict(network.state_dict())
    for name, mask in mask_set.masks.items():
        weight, kept = state.pop(name).flatten(1), mask.flatten(1)
        # by the mask, not by the values: a kept weight of zero stays
        state[f"{name}.crow_indices"] = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        state[f"{name}.col_indices"] = kept.nonzero()[:, 1].int()
        state[f"{name}.values"] = weight[kept]
    shapes = json.dumps({name: list(mask.shape) for name, mask in mask_set.masks.items()})
    models.save_tensors(path, state, {**_about(mask_set, "csr"), "layers": shapes})


def _masks(path: Path, network: nn.Module, mask_set: MaskSet) -> None:
    masks.save(path, mask_set)


WRITERS: dict[str, Callable[[Path, nn.Module, MaskSet], None]] = {
    "dense": _dense, "prune": _prune, "csr": _csr, "masks": _masks,
}  # fmt: skip


def _about(mask_set: MaskSet, kind: str) -> dict[str, str]:
    about = {"schema": f"dopfast.{kind}", "about": json.dumps(mask_set.about)}
    # what `models.parse_teacher` reads
    return {**about, "model": mask_set.about["model"]} if "model" in mask_set.about else about
