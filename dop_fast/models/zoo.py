"""Networks by name: those for 32 pixels, torchvision's, timm's, Hugging Face's, and one's own."""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dop_fast.cifar import NETWORKS
from dop_fast.errors import ModelError
from dop_fast.models import libraries
from dop_fast.seeding import derive

AUXILIARY_HEADS = ("googlenet", "inception_v3")
FUNCTION = re.compile(r"[\w.]+:\w+")
OTHERS = "timm:NAME, hf:FOLDER or package.module:function"


def names() -> tuple[str, ...]:
    """Return the architectures known without a prefix: torchvision's classifiers and CIFAR's."""
    return tuple(sorted({*torchvision.models.list_models(torchvision.models), *NETWORKS}))


def check(name: str) -> None:
    """Raise ModelError, with the nearest names, where no network is called so.

    Whether a function of one's own is there shows when it is called.
    """
    library, own = _parted(name)
    if library is not None:
        library.check(own)
    elif name not in names() and not FUNCTION.fullmatch(name):
        known = (*names(), *libraries.prefixed_names())
        near = difflib.get_close_matches(name, known, 3)
        raise ModelError(
            f"there is no network called {name!r}",
            f"did you mean {', '.join(near)}? or {OTHERS}"
            if near
            else f"a torchvision classifier, {OTHERS}",
        )


def build(name: str, num_classes: int, seed: int, root: Path = Path()) -> nn.Module:
    """Return a network on the CPU with the weights that its own initialisation draws from `seed`.

    `name` is one of `names()`; or `timm:NAME`, of which the prefix may be left out where
    torchvision has no such name; or `hf:`, before a folder with a config.json, a type of model
    such as vit, or a name on the Hub; or `package.module:function`, called with `num_classes=`.
    Folders and modules are looked for in `root`, then in the current folder. Torch's global
    generator stays as it was. Raises ModelError.
    """
    make = _maker(name, root)
    with own_draws(seed):
        model = make(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} returned {type(model).__name__}, not a network",
            "return a torch.nn.Module from it",
        )
    return model


def pretrained(name: str, num_classes: int, root: Path) -> nn.Module:
    """Return a network with the weights that its library gives; ModelError where it has none."""
    library, own = _parted(name)
    with own_draws(0):  # building draws, though every weight is replaced
        if library is not None:
            return library.pretrained(own, num_classes, root)
        if name in NETWORKS or name not in names():
            raise ModelError(f"torchvision has no weights for {name}", f"name a file: {name}=FILE")
        return _torchvision_pretrained(name, num_classes)


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Draw weights on the CPU from `seed`; afterwards the global generator is as before."""
    # this one generator, not torch.manual_seed: that would reseed every GPU too
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(derive(seed, "init"))
        yield


def _parted(name: str) -> tuple[libraries.Library | None, str]:
    """Return the library that a name is of, None for the others, and its name in there."""
    prefix, colon, own = name.partition(":")
    if colon and prefix in libraries.LIBRARIES:
        return libraries.LIBRARIES[prefix], own
    is_ours = name in names() or FUNCTION.fullmatch(name)
    return None if is_ours or not libraries.timm_has(name) else libraries.LIBRARIES["timm"], name


def _maker(name: str, root: Path) -> Callable[..., Any]:
    check(name)
    library, own = _parted(name)
    if library is not None:
        return partial(library.build, own, root=root)
    if name in NETWORKS:
        return NETWORKS[name]
    if name not in names():
        return _imported(name, root)
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


def _torchvision_pretrained(name: str, num_classes: int) -> nn.Module:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    libraries.check_classes(name, len(weights.meta["categories"]), num_classes)
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=weights, progress=False)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot download the weights of {name}: {error}",
            f"fetch {weights.url} by other means, then name the file: {name}=FILE",
        ) from error
    return model
