"""Classifiers by name, their weights on disk, and the layers and weights that we look at."""

import difflib
import hashlib
import importlib
import inspect
import pickle
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from dop_fast import disk, seals
from dop_fast.cifar import NETWORKS
from dop_fast.config import TeacherConfig
from dop_fast.errors import ModelError
from dop_fast.seeding import derive

DEFAULT = "DEFAULT"  # weights: torchvision's own
POOLING = (_MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd)
AUXILIARY_HEADS = ("googlenet", "inception_v3")
FUNCTION = re.compile(r"[\w.]+:\w+")
PICKLES = (".pt", ".pth")
FILES = (".safetensors", *PICKLES)
# what torch.load raises for files that are damaged or hold more than weights
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
    AttributeError, TypeError, AssertionError,
)  # fmt: skip


def names() -> tuple[str, ...]:
    """Return the known architectures: torchvision's classifiers and the CIFAR networks."""
    return tuple(sorted({*torchvision.models.list_models(torchvision.models), *NETWORKS}))


def build(name: str, num_classes: int, seed: int, root: Path = Path()) -> nn.Module:
    """Return a network on the CPU with the weights that its own initialisation draws from `seed`.

    `name` is one of `names()`, or `package.module:function`, looked for in `root` and in the
    current folder too and called with `num_classes=`. Torch's global generator stays as it was.
    Raises ModelError.
    """
    make = _maker(name, root)
    with _own_draws(seed):
        model = make(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned {type(model).__name__}, not a network",
            "return a torch.nn.Module from it",
        )
    return model


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
        model = _pretrained(config.name, num_classes)
    else:
        path = root / Path(config.weights).expanduser()
        model = build(config.name, num_classes, 0, root)
        _fill(model, _read_weights(path), f"{path} does not fit {config.name}")
    return model.eval().requires_grad_(False)


def parse_teacher(spec: str) -> TeacherConfig:
    """Read `NAME`, `NAME=DEFAULT`, `FILE` or `NAME=FILE`; files are returned as absolute paths.

    A name alone is a teacher yet to be trained. A file alone names its architecture in the
    metadata key "model", or by beginning with it (`resnet20_cifar10.pth`). Raises ModelError.
    """
    name, equals, weights = spec.partition("=")
    if equals and not Path(spec).exists():
        if not _is_name(name):
            raise _unknown(name)
        return TeacherConfig(name, weights if weights == DEFAULT else str(_existing(weights)))
    if not spec.endswith(FILES):
        if not _is_name(spec):
            raise _unknown(spec)
        return TeacherConfig(spec, "")
    path = _existing(spec)
    found = _architecture(path)
    if not found:
        raise ModelError(
            f"{path.name} does not say which architecture it holds", f"say it: NAME={spec}"
        )
    return TeacherConfig(found, str(path))


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions, linear layers and attention, shared ones once.

    By parameter name, in the order of `named_parameters`; biases and norms are not among them.
    """
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            wanted.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
            wanted.update(id(getattr(module, projection)) for projection in projections)
    return {name: weight for name, weight in model.named_parameters() if id(weight) in wanted}


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module called `name`; ModelError with the nearest names if there is none."""
    modules: dict[str, nn.Module] = {key: part for key, part in model.named_modules() if key}
    if name in modules:
        return modules[name]
    near = difflib.get_close_matches(name, modules, 3) or [key for key, _ in model.named_children()]
    raise ModelError(f"the network has no layer {name!r}", f"nearest: {', '.join(near)}")


def bottleneck(model: nn.Module, example: Tensor) -> str:
    """Return the name of the penultimate layer, seen in a forward of `example` [n 3 h w].

    It is the last module before the last layer with weights whose output is a map, [n c h w] or
    [n h w c] or [n tokens c], of more than one position. Pooling and modules that run twice do
    not count; of modules with the same output the outermost does. A network without maps gives
    the module whose output enters its last linear layer. Raises ModelError.
    """
    calls = _forward_calls(model, example)
    runs = Counter(call.name for call in calls)
    heads = [i for i, call in enumerate(calls) if isinstance(call.module, _ConvNd | nn.Linear)]
    last = heads[-1] if heads else 0
    once = [call for call in calls[:last] if runs[call.name] == 1]
    maps = [
        call
        for call in once
        if _is_map(call.output, len(example)) and not isinstance(call.module, POOLING)
    ]
    if not once:
        raise ModelError("the network has no layer before its last one", "set [teacher] layer")
    entering = [call for call in once if call.output is calls[last].input]
    chosen = (maps or entering or once)[-1]
    same = [call.name for call in once if call.output is chosen.output]
    return min(same, key=lambda name: name.count("."))  # the first of the outermost


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


@contextmanager
def _own_draws(seed: int) -> Iterator[None]:
    """Draw weights on the CPU from `seed`; afterwards the global generator is as before."""
    # this one generator, not torch.manual_seed: that would reseed every GPU too
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        yield


def _maker(name: str, root: Path) -> Callable[..., Any]:
    if FUNCTION.fullmatch(name):
        return _imported(name, root)
    if name in NETWORKS:
        return NETWORKS[name]
    if not _is_name(name):
        raise _unknown(name)
    # without auxiliary heads the output is plain logits in training too
    plain = {"aux_logits": False, "init_weights": True} if name in AUXILIARY_HEADS else {}
    return partial(torchvision.models.get_model, name, weights=None, **plain)


def _imported(name: str, root: Path) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    folders = [str(root.resolve()), str(Path.cwd())]
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ModelError(
            f"cannot import {module_name}: {error}", f"looked in {', '.join(folders)} too"
        ) from error
    finally:
        for folder in folders:
            sys.path.remove(folder)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, vars(module), 3)
        raise ModelError(
            f"{module_name} has no function {attribute!r}",
            f"nearest: {', '.join(near)}" if near else f"write it in {module.__file__}",
        )
    try:
        inspect.signature(function).bind(num_classes=2)
    except TypeError as error:
        raise ModelError(f"{name}: {error}", "it is called with num_classes=") from error
    made: Callable[..., Any] = function
    return made


def _is_name(name: str) -> bool:
    return FUNCTION.fullmatch(name) is not None or name in names()


def _unknown(name: str) -> ModelError:
    near = difflib.get_close_matches(name, names(), 3)
    own = "or package.module:function"
    return ModelError(
        f"there is no network called {name!r}",
        f"did you mean {', '.join(near)}? {own}" if near else f"a torchvision classifier, {own}",
    )


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
    fits = [name for name in names() if re.match(re.escape(name) + r"(?![a-z0-9])", stem)]
    return about.get("model") or max(fits, key=len, default="")


def _pretrained(name: str, num_classes: int) -> nn.Module:
    if name in NETWORKS or name not in names():
        raise ModelError(f"torchvision has no weights for {name}", f"name a file: {name}=FILE")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    known = len(weights.meta["categories"])
    if known != num_classes:
        raise ModelError(
            f"torchvision's {name} knows {known} classes, the data has {num_classes}",
            f"train one on the data: --teacher {name}, then dopfast train",
        )
    try:
        with _own_draws(0):  # building draws, though every weight is replaced
            model: nn.Module = torchvision.models.get_model(name, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot download the weights of {name}: {error}",
            f"fetch {weights.url} by other means, then name the file: {name}=FILE",
        ) from error
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file."""
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


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    input: object
    output: object


def _forward_calls(model: nn.Module, example: Tensor) -> list[_Call]:
    """Return the calls of a forward in eval mode, in order of completion, but the root's."""
    calls: list[_Call] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        calls.append(_Call(name, module, inputs[0] if inputs else None, output))

    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model.eval()(example)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"the network does not take images of {list(example.shape[1:])}: {error}",
            "change [data] size or the architecture",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return calls


def _is_map(output: object, images: int) -> bool:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or len(output) != images:
        return False
    # channels first or last: either way more than one position leaves two sides above 1
    return sum(side > 1 for side in output.shape[1:]) > 1
