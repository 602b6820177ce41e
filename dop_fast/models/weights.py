"""Weights of networks on disk, and of the teacher: read without running code from a file."""

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dop_fast import disk, seals
from dop_fast.config import TeacherConfig
from dop_fast.errors import ModelError
from dop_fast.models import zoo

DEFAULT = "DEFAULT"  # weights: the library's own
PICKLES = (".pt", ".pth")
FILES = (".safetensors", *PICKLES)
# what torch.load raises for files that are damaged or hold more than weights
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
    AttributeError, TypeError, AssertionError,
)  # fmt: skip


def load_teacher(config: TeacherConfig, num_classes: int, root: Path) -> nn.Module:
    """Return the trained classifier, in eval mode and frozen; paths are seen from `root`.

    Raises ModelError where there are no weights, or where they do not fit the architecture or
    the number of classes.
    """
    if not config.weights:
        raise ModelError(
            f"the teacher {config.name} has no weights yet",
            "train it: dopfast train, or name a file: [teacher] weights",
        )
    if config.weights == DEFAULT:
        model = zoo.pretrained(config.name, num_classes, root)
    else:
        path = root / Path(config.weights).expanduser()
        model = zoo.build(config.name, num_classes, 0, root)
        load_weights(path, model, config.name)
    return model.eval().requires_grad_(False)


def load_weights(path: Path, model: nn.Module, name: str) -> None:
    """Fill a model, called `name` in errors; ModelError where the file's state does not fit it."""
    _fill(model, read_tensors(path), f"{path} does not fit {name}")


def parse_teacher(spec: str) -> TeacherConfig:
    """Read `NAME`, `NAME=DEFAULT`, `FILE` or `NAME=FILE`; files are returned as absolute paths.

    A name alone is a teacher yet to be trained. A file alone names its architecture in the
    metadata key "model", or by beginning with it (`resnet20_cifar10.pth`). Raises ModelError.
    """
    name, equals, weights = spec.partition("=")
    if equals and not Path(spec).exists():
        zoo.check(name)
        return TeacherConfig(name, weights if weights == DEFAULT else str(_existing(weights)))
    if not spec.endswith(FILES):
        zoo.check(spec)
        return TeacherConfig(spec, "")
    path = _existing(spec)
    found = _architecture(path)
    if not found:
        raise ModelError(
            f"{path.name} does not say which architecture it holds", f"say it: NAME={spec}"
        )
    return TeacherConfig(found, str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file; ModelError where it is none."""
    _existing(str(path))
    if path.suffix == ".safetensors":
        if seals.broken(path):
            raise _damaged(path, ValueError("its checksum is wrong"))
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    if path.suffix not in PICKLES:
        raise ModelError(f"{path} is no file of weights", f"it must end in {', '.join(FILES)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ModelError(
            f"{path} is not a state dict", "save model.state_dict(), not a model or an optimiser"
        )
    if all(name.startswith("module.") for name in content):  # saved from DataParallel
        return {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return dict(content)


def fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """Return a hash over the names, shapes, types and bytes of a state."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(flat.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_weights(path: Path, model: nn.Module, about: Mapping[str, str]) -> None:
    """Write a state with `about` as metadata; `about["model"]` is what `parse_teacher` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, model.state_dict(), about)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, in place of an older one; StoreError where the disk is full."""
    # a copy each: safetensors refuses tied weights and strided memory
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with disk.replacing(path, sum(tensor.nbytes for tensor in plain.values())) as partial_path:
        save_file(plain, partial_path, {**metadata, **seals.EMPTY})
        seals.stamp(partial_path)


def _existing(path: str) -> Path:
    found = Path(path).expanduser().resolve()
    if not found.is_file():
        raise ModelError(f"there is no file of weights at {found}", "check the path")
    return found


def _architecture(path: Path) -> str:
    """Return the architecture that a file of weights names, or an empty text."""
    about: dict[str, str] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    stem = path.stem.lower()
    fits = [name for name in zoo.names() if re.match(re.escape(name) + r"(?![a-z0-9])", stem)]
    return about.get("model") or max(fits, key=len, default="")


def _damaged(path: Path, error: Exception) -> ModelError:
    if isinstance(error, pickle.UnpicklingError):
        return ModelError(
            f"{path} is damaged, or a pickle with more than weights, which could run code",
            "save its state dict: safetensors.torch.save_file(model.state_dict(), FILE)",
        )
    return ModelError(f"{path} is damaged: {error}", "copy or download it again")


def _fill(model: nn.Module, state: Mapping[str, Tensor], lead: str) -> None:
    """Load a state; ModelError with the first differences in names and shapes."""
    expected = model.state_dict()
    # a count of batches, absent from old files, is of no use to a finished network
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "shape": shapes}
    found = [f"{kind}: {_first(items)}" for kind, items in groups.items() if items]
    if found:
        raise ModelError(
            f"{lead}: {'; '.join(found)}", "check the architecture and the number of classes"
        )
    wild = [n for n in expected if n in state and not bool(state[n].isfinite().all())]
    if wild:
        raise ModelError(
            f"{lead}: NaN or infinite: {_first(wild)}", "train it again, with a lower --lr"
        )
    model.load_state_dict(state, strict=False)


def _first(items: list[str], count: int = 3) -> str:
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")
