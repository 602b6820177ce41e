"""ONNX: written by PyTorch, then read back and run."""

import importlib
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dop_fast import disk
from dop_fast.errors import ModelError
from dop_fast.masks import MaskSet

ABOUT = "dopfast.about"
CLOSE = 1e-3
"""Of the largest logit: two runtimes add in other orders, and blocks of layers amplify it."""


def write(path: Path, network: nn.Module, mask_set: MaskSet, image: Sequence[int]) -> float | None:
    """Write a network in eval mode; return how far onnxruntime is from it, None if not installed.

    Raises `ModelError`, and leaves no file, where it cannot be exported, a zero is lost or the
    logits differ.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ModelError(
                f"{package} is not installed", 'install it: pip install "dopfast[onnx]"'
            )
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *image, generator=generator)
    content = _exported(network, example, json.dumps(mask_set.about)).SerializeToString()
    _check_zeros(content, mask_set)
    difference = _difference(content, network, example) if find_spec("onnxruntime") else None
    disk.write(path, content)
    return difference


def _exported(network: nn.Module, example: Tensor, about: str) -> Any:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about its exporter
        try:
            # without optimize, which folds transposes into weights and so takes their names
            program = torch.onnx.export(
                network, (example,), input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), dynamo=True, optimize=False,
                verbose=False,
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise ModelError(
                f"the network cannot be written as ONNX: {reason}", "export another kind: csr"
            ) from error
    assert program is not None  # dynamo
    proto = program.model_proto
    for node in proto.graph.node:  # where in this machine's files each operation comes from
        node.ClearField("metadata_props")
    proto.metadata_props.add(key=ABOUT, value=about)
    return proto


def _check_zeros(content: bytes, mask_set: MaskSet) -> None:
    written, _ = _weights(content)
    for name, mask in mask_set.masks.items():
        if name not in written:
            raise ModelError(f"{name} is not in the ONNX file", "export another kind: csr")
        if bool(written[name][~mask].any()):
            raise ModelError(f"removed weights of {name} are not zero in the ONNX file")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights of an ONNX file by name, and what `write` said of the mask."""
    if not path.is_file():
        raise ModelError(f"there is no file at {path}", "check the path")
    try:
        return _weights(path.read_bytes())
    except (importlib.import_module("google.protobuf.message").DecodeError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", "copy or export it again") from error


def _weights(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    onnx = importlib.import_module("onnx")
    model = onnx.load_from_string(content)
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    about = {each.key.removeprefix("dopfast."): each.value for each in model.metadata_props}
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, about


def _difference(content: bytes, network: nn.Module, example: Tensor) -> float:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors: what it cannot fold is no news
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": example.numpy()})
    with torch.no_grad():
        logits = network(example)
    off, largest = (float(each.abs().max()) for each in (torch.from_numpy(found) - logits, logits))
    if not off <= CLOSE * largest:  # NaN too
        raise ModelError(
            f"onnxruntime's logits are off by {off:.2g}, PyTorch's largest is {largest:.2g}",
            "export another kind: csr",
        )
    return off / largest if largest else 0.0
