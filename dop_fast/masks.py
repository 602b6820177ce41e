"""Masks: which weights stay. Made from scores, stored a bit a weight, applied in place.

Layout of a mask file (safetensors), schema `dopfast.mask`, version 1:
    one tensor a layer, by parameter name: uint8, `np.packbits` of the flattened mask
    metadata: schema, version, dopfast, and as JSON
        layers  {name: {"shape": [...], "kept": n}}, in the model's order
        about   what the caller says the mask was made from
Densities can so be read without dopfast and without unpacking; `kept` also tells damaged bits.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise
from torch import Tensor, nn

from dop_fast import __version__, disk, seals
from dop_fast.errors import ConfigError, ModelError, StoreError
from dop_fast.kernels import bits, select
from dop_fast.seeding import derive
from dop_fast.types import Scores

SCHEMA, VERSION = "dopfast.mask", 1


class LayerMask(NamedTuple):
    """One row of a mask's layer table."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def density(self) -> float:
        """Share of the layer's weights that stay."""
        return self.kept / self.total


@dataclass(frozen=True)
class MaskSet:
    """Which prunable weights stay: bool on the CPU by parameter name, shaped as the weight.

    `about` is JSON-able: what the mask was made from.
    """

    masks: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)

    def layers(self) -> tuple[LayerMask, ...]:
        """Return the layer table, in the model's order."""
        return tuple(
            LayerMask(name, tuple(mask.shape), int(mask.sum()), mask.numel())
            for name, mask in self.masks.items()
        )

    @property
    def kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def density(self) -> float:
        """Share of the prunable weights that stay."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are removed."""
        return 1 - self.density

    def overall_sparsity(self, model: nn.Module) -> float:
        """Return the removed share of all parameters of `model`, the paper's definition.

        Biases and batch norm count among all, and as not zero whatever they are initialised to.
        """
        return (self.total - self.kept) / sum(value.numel() for value in model.parameters())


def keep_top(
    scores: Scores,
    sparsity: float,
    floor: float = 0.0,
    protected: Collection[str] | None = None,
) -> MaskSet:
    """Keep exactly k = round(N (1 - sparsity)) of all N weights, the best, and at least one.

    Of each layer of n weights, or of each of the `protected` ones, the best ceil(n floor) stay in
    any case. Among equal scores the lower index stays: earlier layer first, then earlier in the
    flattened weight. Raises `ModelError` for a score that is NaN or infinite, `ConfigError` where
    the floors together ask for more than k.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must lie in [0, 1), got {sparsity}", "try --sparsity 0.9")
    if not scores:
        raise ModelError("there are no weights to prune", "score a model that has convolutions")
    total = sum(score.numel() for score in scores.values())
    k = max(1, round(total * (1 - sparsity)))
    sure = _floors(scores, floor, protected, k)
    try:
        kept = _best(list(scores.values()), k, sure)
    except select.UnorderedError as error:
        raise _unordered(list(scores)[error.layer]) from error
    return MaskSet(dict(zip(scores, kept, strict=True)))


def keep_two_of_four(scores: Scores) -> MaskSet:
    """Keep the 2 best of every 4 consecutive inputs, at each output and each place of a kernel.

    Inputs are a weight's second dimension: by what 2:4 sparse matrix products, PyTorch's and
    TensorRT's, count their fours. A layer whose inputs are no multiple of 4 keeps everything. Of
    equal scores the lower index stays. Raises `ModelError` for a score that is NaN or infinite.
    """
    kept = {}
    for name, score in scores.items():
        if not bool(score.isfinite().all()):
            raise _unordered(name)
        kept[name] = _best_of_fours(score).cpu()
    return MaskSet(kept)


def has_fours(weight: Tensor) -> bool:
    """Return whether `keep_two_of_four` removes half of this layer."""
    return weight.shape[1] % 4 == 0


def _best_of_fours(score: Tensor) -> Tensor:
    if not has_fours(score):
        return torch.ones(score.shape, dtype=torch.bool)
    inputs_last = score.detach().movedim(1, -1)
    fours = inputs_last.reshape(*inputs_last.shape[:-1], -1, 4)
    kept = torch.empty(fours.shape, dtype=torch.bool, device=score.device)
    for i, own in enumerate(fours.unbind(-1)):
        others = [other for j, other in enumerate(fours.unbind(-1)) if j != i]
        # those before it win a tie, those behind lose it
        better = [other >= own if j < i else other > own for j, other in enumerate(others)]
        kept[..., i] = sum(part.to(torch.int8) for part in better) < 2
    return kept.flatten(-2).movedim(-1, 1).contiguous()


def _unordered(name: str) -> ModelError:
    return ModelError(f"a score in {name} is NaN or infinite", "score on other material")


def _floors(scores: Scores, floor: float, protected: Collection[str] | None, k: int) -> list[int]:
    """Return how many weights of each layer stay in any case."""
    if not 0 <= floor <= 1:
        raise ConfigError(
            f"min_layer_density must lie in [0, 1], got {floor}", "try --min-layer-density 0.01"
        )
    # of the number as it is written: 0.1 * 30 is a little more than 3
    share = Fraction(str(floor))
    sizes = {
        name: score.numel()
        for name, score in scores.items()
        if protected is None or name in protected
    }
    sure = [math.ceil(share * sizes.get(name, 0)) for name in scores]
    if sum(sure) > k:
        most = k / sum(sizes.values())
        raise ConfigError(
            f"the layers' floors ask for {sum(sure)} weights, the sparsity leaves {k}",
            f"lower --min-layer-density to less than {most:.3g}, or --sparsity",
        )
    return sure


def _best(scores: list[Tensor], k: int, sure: list[int]) -> list[Tensor]:
    """Return masks of the k best scores, of each layer the `sure` best ones among them."""
    if not any(sure):
        packed = select.top(scores, k, finite=True)
        return [bits.unpack(p.cpu(), s.shape) for p, s in zip(packed, scores, strict=True)]
    for layer, score in enumerate(scores):
        if not bool(score.isfinite().all()):
            raise select.UnorderedError(layer)
    kept = []
    for score, count in zip(scores, sure, strict=True):
        own = select.top([score], count)[0].cpu() if count else None
        none = torch.zeros(score.shape, dtype=torch.bool)
        kept.append(none if own is None else bits.unpack(own, score.shape))
    if k == sum(sure):
        return kept
    left = [
        score.detach().masked_fill(mask.to(score.device), -math.inf)
        for score, mask in zip(scores, kept, strict=True)
    ]
    packed = select.top(left, k - sum(sure))
    return [mask | bits.unpack(p.cpu(), mask.shape) for mask, p in zip(kept, packed, strict=True)]


def apply_(model: nn.Module, mask_set: MaskSet) -> None:
    """Set the removed weights of `model` to zero, in place.

    Raises `ModelError`, and changes nothing, where the layers are not those of the mask.
    """
    check_fit(model, mask_set)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in mask_set.masks.items():
            # not a product: that leaves -0.0, and keeps NaN
            weights[name].masked_fill_(~mask.to(weights[name].device), 0)


def check_fit(model: nn.Module, mask_set: MaskSet) -> None:
    """Raise `ModelError` where the layers of `model` are not those of the mask."""
    wrong = _misfits(model, dict(model.named_parameters()), mask_set.masks)
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(
            f"the mask is not one of this model: {'; '.join(wrong[:5])}{more}",
            "use the model that the mask was made for",
        )


def _misfits(
    model: nn.Module, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> list[str]:
    def kind(name: str) -> tuple[type, str]:
        owner, _, attribute = name.rpartition(".")
        return type(model.get_submodule(owner)), attribute

    wrong = [f"{name} is not in the model" for name in masks if name not in weights]
    both = [name for name in masks if name in weights]
    wrong += [
        f"{name} is {list(weights[name].shape)}, its mask {list(masks[name].shape)}"
        for name in both
        if weights[name].shape != masks[name].shape
    ]
    # a deeper network of the same family has all these layers and more: it would stay half dense
    masked = {kind(name) for name in both}
    wrong += [
        f"{name} has no mask" for name in weights if name not in masks and kind(name) in masked
    ]
    return wrong


def save(path: str | Path, mask_set: MaskSet) -> None:
    """Write the masks to `path`, in place of an older file; equal masks give equal bytes."""
    path = Path(path)
    packed = {name: bits.pack(mask).numpy() for name, mask in mask_set.masks.items()}
    layers = {row.name: {"shape": row.shape, "kept": row.kept} for row in mask_set.layers()}
    metadata = {
        "schema": SCHEMA,
        "version": str(VERSION),
        "dopfast": __version__,
        "layers": json.dumps(layers),
        "about": json.dumps(mask_set.about),
        **seals.EMPTY,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content = serialise(packed, metadata)
    with disk.replacing(path, len(content)) as partial:
        partial.write_bytes(content)
        seals.stamp(partial)


def load(path: str | Path) -> MaskSet:
    """Read the masks at `path`; `StoreError` where it is missing, foreign or damaged."""
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"there is no mask at {path}", "make one: dopfast prune")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found = metadata.get("schema"), metadata.get("version")
            if found != (SCHEMA, str(VERSION)):
                raise StoreError(
                    f"{path} is {found[0]} version {found[1]}, "
                    f"this dopfast reads {SCHEMA} version {VERSION}",
                    "make it again: dopfast prune --force",
                )
            mask_set = _read(file, metadata)
        if seals.broken(path):
            raise _DamageError("its checksum is wrong")
        return mask_set
    except (SafetensorError, _DamageError) as error:
        raise StoreError(
            f"{path} is damaged: {error}", "make it again: dopfast prune --force"
        ) from error


class _DamageError(Exception):
    """What is wrong inside a mask file."""


def _read(file: Any, metadata: Mapping[str, str]) -> MaskSet:
    layers, about = _json(metadata, "layers"), _json(metadata, "about")
    if set(layers) != set(file.keys()) or not layers:
        raise _DamageError("its layers are not those of its table")
    masks = {name: _unpack(file, name, row) for name, row in layers.items()}
    return MaskSet(masks, about)


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError) as error:
        raise _DamageError(f"its metadata has no {key}") from error
    if not isinstance(value, dict):
        raise _DamageError(f"its {key} are not a table")
    return value


def _unpack(file: Any, name: str, row: Any) -> Tensor:
    match row:
        case {"shape": [*shape], "kept": int(kept)} if all(type(n) is int for n in shape):
            pass
        case _:
            raise _DamageError(f"the table's row of {name} has no shape and count")
    stored = file.get_slice(name)
    if stored.get_dtype() != "U8":
        raise _DamageError(f"{name} holds {stored.get_dtype()}, not packed bits (U8)")
    total = math.prod(shape)
    if min(shape, default=1) < 1 or stored.get_shape() != [-(-total // 8)]:
        raise _DamageError(f"the bits of {name} do not fit its shape {shape}")
    mask = bits.unpack(torch.from_numpy(file.get_tensor(name)), shape)
    if (found := int(mask.sum())) != kept:
        raise _DamageError(f"{name} keeps {found} weights, its table says {kept}")
    return mask


def shuffled(mask_set: MaskSet, seed: int) -> MaskSet:
    """Deal every layer's kept places anew, by lot: the same count in each layer, and `about`."""
    dealt = {}
    for name, mask in mask_set.masks.items():
        generator = torch.Generator().manual_seed(derive(seed, "shuffle", name))
        order = torch.randperm(mask.numel(), generator=generator)
        dealt[name] = mask.flatten()[order].view(mask.shape)
    return MaskSet(dealt, mask_set.about)
