"""Networks of libraries that need not be installed: `timm:NAME` and `hf:FOLDER`."""

import difflib
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dop_fast.errors import ModelError


class Library(Protocol):
    """What makes networks of the names behind its prefix; each raises ModelError."""

    def check(self, name: str) -> None:
        """Refuse a name that is not known, with the nearest ones."""

    def build(self, name: str, *, num_classes: int, root: Path) -> nn.Module:
        """Return a network as its own initialisation draws it; nothing of its weights is read."""

    def pretrained(self, name: str, num_classes: int, root: Path) -> nn.Module:
        """Return a network with the library's weights."""


def timm_has(name: str) -> bool:
    """Return whether timm is installed and knows the name."""
    return find_spec("timm") is not None and bool(_load("timm").is_model(name))


def prefixed_names() -> list[str]:
    """Return timm's names with their prefix, if timm is installed."""
    return [f"timm:{name}" for name in _load("timm").list_models()] if find_spec("timm") else []


def check_classes(name: str, known: int, num_classes: int) -> None:
    """Refuse a trained network of another number of classes than the data's."""
    if known != num_classes:
        raise ModelError(
            f"{name} is trained on {known} classes, the data has {num_classes}",
            f"train one on the data: --teacher {name}, then dopfast train",
        )


class _Timm:
    def check(self, name: str) -> None:
        timm = _load("timm")
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), 3)
            raise ModelError(
                f"timm has no network called {name!r}",
                f"did you mean {', '.join(near)}?" if near else "see timm.list_models()",
            )

    def build(self, name: str, *, num_classes: int, root: Path) -> nn.Module:
        made: nn.Module = _load("timm").create_model(name, num_classes=num_classes)
        return made

    def pretrained(self, name: str, num_classes: int, root: Path) -> nn.Module:
        self.check(name)
        try:
            made: nn.Module = _load("timm").create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"cannot get timm's weights of {name}: {error}", f"name a file: timm:{name}=FILE"
            ) from error
        check_classes(f"timm:{name}", int(made.num_classes), num_classes)  # type: ignore[arg-type]
        return made


class _HuggingFace:
    def check(self, name: str) -> None:
        _load("transformers")

    def build(self, name: str, *, num_classes: int, root: Path) -> nn.Module:
        config = _config(name, root)
        config.num_labels = num_classes
        auto = _load("transformers").AutoModelForImageClassification
        try:
            made = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except ValueError as error:
            raise ModelError(
                f"hf:{name} is no image classifier of transformers: {error}",
                "give a folder of one that transformers itself knows",
            ) from error
        return _with_logits(made)

    def pretrained(self, name: str, num_classes: int, root: Path) -> nn.Module:
        auto = _load("transformers").AutoModelForImageClassification
        try:
            made, found = auto.from_pretrained(
                _folder(name, root) or name, dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise ModelError(
                f"cannot get the weights of hf:{name}: {error}", "give a folder that holds them"
            ) from error
        if found["missing_keys"]:
            raise ModelError(
                f"hf:{name} has no weights for {', '.join(sorted(found['missing_keys'])[:3])}",
                "give a folder of a trained classifier",
            )
        check_classes(f"hf:{name}", made.config.num_labels, num_classes)
        return _with_logits(made)


LIBRARIES: dict[str, Library] = {"timm": _Timm(), "hf": _HuggingFace()}


def _load(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModelError(
            f"{package} is not installed", f'install it: pip install "dopfast[{package}]"'
        ) from error


def _config(name: str, root: Path) -> Any:
    auto = _load("transformers").AutoConfig
    types = _load("transformers.models.auto.modeling_auto")
    known = types.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    folder = _folder(name, root)
    if folder is None and name in known:
        return auto.for_model(name)
    if folder is None and "/" not in name:
        near = difflib.get_close_matches(name, known, 3) or sorted(known)
        raise ModelError(
            f"there is no folder {name} with a config.json, and transformers has no such type",
            f"types of image classifiers: {', '.join(near)}",
        )
    try:
        return auto.from_pretrained(folder or name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read the configuration of hf:{name}: {error}",
            "give a folder that holds its config.json",
        ) from error


def _folder(name: str, root: Path) -> Path | None:
    places = (root / Path(name).expanduser(), Path(name).expanduser())
    return next((place for place in places if (place / "config.json").is_file()), None)


def _with_logits(network: nn.Module) -> nn.Module:
    # a hook, not a module around it: parameters keep the names that they have in other programs
    network.register_forward_hook(_logits)
    return network


def _logits(network: nn.Module, images: object, output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits
