"""Algorithm 1 as five calls on a workspace: train, extract, stitch, prune, finetune."""

from dop_fast.pipeline.discovery import Stitched, concept_table, extract, open_patches, stitch
from dop_fast.pipeline.exchange import export, import_mask
from dop_fast.pipeline.networks import (
    Training,
    finetune,
    open_mask,
    prune,
    run_folder,
    train,
)
from dop_fast.pipeline.opening import (
    alone,
    device_of,
    init,
    open_data,
    small_classes,
    teacher_config,
)
from dop_fast.types import Track, untracked

__all__ = [
    "Stitched",
    "Track",
    "Training",
    "alone",
    "concept_table",
    "device_of",
    "export",
    "extract",
    "finetune",
    "import_mask",
    "init",
    "open_data",
    "open_mask",
    "open_patches",
    "prune",
    "run_folder",
    "small_classes",
    "stitch",
    "teacher_config",
    "train",
    "untracked",
]
