"""dopfast: data-aware one-shot pruning at initialisation with discriminative image patches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dop_fast.api import (
        MaskSet,
        apply_mask,
        export,
        extract,
        finetune,
        hold,
        init,
        load_mask,
        prune,
        read_mask,
        save_mask,
        stitch,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "MaskSet", "apply_mask", "export", "extract", "finetune", "hold", "init", "load_mask", "prune",
    "read_mask", "save_mask", "stitch", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the API when it is first used: it needs PyTorch, `dopfast --help` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dop_fast.api"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
