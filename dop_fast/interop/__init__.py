"""Sparse networks and masks as other programs read them, and masks from their files.

Kinds of file:
    dense   safetensors, the state of the network with its removed weights zero
    prune   safetensors, a state for `torch.nn.utils.prune`: NAME_orig and NAME_mask for each weight
    csr     safetensors, NAME.crow_indices, .col_indices and .values of each weight as a matrix
            [outputs, rest], int32 indices; its shape by name, as JSON, in the metadata key "layers"
    masks   safetensors, a bit a weight: dopfast's own, see `dop_fast.masks`
    onnx    the network, for any number of images at once; weights keep their names
All but `masks` hold the whole state, and none is a pickle.
"""

from dop_fast.interop.reading import read
from dop_fast.interop.writing import Exported, export

__all__ = ["Exported", "export", "read"]
