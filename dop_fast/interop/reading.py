"""Masks from files of other programs; a pickle is never loaded."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dop_fast import masks, models
from dop_fast.errors import ModelError
from dop_fast.masks import MaskSet


def read(path: str | Path, model: nn.Module) -> MaskSet:
    """Read the mask of `model` from a file of any kind of `export`, or a state dict of one.

    A layer's mask is NAME_mask, of zeros and ones, as `torch.nn.utils.prune` and SynFlow's code
    call it; or in CSR the places of its values; or where NAME itself is not zero, be it a weight
    or, as in OpenLTH's files, a mask. Raises `ModelError` where a layer has none, and for a file
    that is damaged or could run code.
    """
    path = Path(path)
    tensors, metadata = _content(path)
    if metadata.get("schema") == masks.SCHEMA:
        found = masks.load(path)
    else:
        layers = {
            name: _mask(tensors, name, weight.shape)
            for name, weight in models.prunable(model).items()
        }
        kept = {name: mask for name, mask in layers.items() if mask is not None}
        missing = [name for name in layers if name not in kept]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(
                f"{path} has neither a mask nor weights of {', '.join(missing[:3])}{more}",
                "read it for the network that it was made for",
            )
        found = MaskSet(kept, json.loads(metadata.get("about", "{}")))
    masks.check_fit(model, found)
    if found.kept == found.total:
        raise ModelError(f"{path} removes no weight", "give a file of a pruned network")
    return found


def _content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix == ".onnx":
        from dop_fast.interop import graphs  # needs onnx

        return graphs.read(path)
    tensors = models.read_tensors(path)
    if path.suffix != ".safetensors":
        return tensors, {}
    with safe_open(path, "pt") as file:
        return tensors, file.metadata() or {}


def _mask(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor | None:
    if f"{name}_mask" in tensors:
        mask = tensors[f"{name}_mask"]
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ModelError(f"{name}_mask has other values than 0 and 1", "save it as 0 and 1")
        return mask.bool()
    if f"{name}.crow_indices" in tensors:
        return _from_rows(tensors, name, shape)
    return tensors[name] != 0 if name in tensors else None


def _from_rows(tensors: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    rows, columns = tensors[f"{name}.crow_indices"], tensors.get(f"{name}.col_indices")
    if columns is None:
        raise ModelError(f"{name} has rows but no columns", "export it again")
    size = shape[0], math.prod(shape[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls its CSR beta
            kept = torch.sparse_csr_tensor(
                rows, columns, torch.ones(len(columns)), size, check_invariants=True
            )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the rows of {name} are damaged: {reason}", "export it again") from error
    return kept.to_dense().bool().view(*shape)
