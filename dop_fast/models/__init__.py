"""Classifiers by name, their weights on disk, and the layers and weights that we look at."""

from dop_fast.models.layers import bottleneck, get_layer, prunable, twin
from dop_fast.models.weights import (
    DEFAULT,
    fingerprint,
    load_teacher,
    load_weights,
    parse_teacher,
    read_tensors,
    save_tensors,
    save_weights,
)
from dop_fast.models.zoo import AUXILIARY_HEADS, build, names

__all__ = [
    "AUXILIARY_HEADS",
    "DEFAULT",
    "bottleneck",
    "build",
    "fingerprint",
    "get_layer",
    "load_teacher",
    "load_weights",
    "names",
    "parse_teacher",
    "prunable",
    "read_tensors",
    "save_tensors",
    "save_weights",
    "twin",
]
