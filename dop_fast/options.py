"""The settings of each stage as keyword arguments, for type checkers and editors.

What they mean, their defaults and ranges stand in `config`; a test holds the two to each other.
"""

from typing import TypedDict


class Extraction(TypedDict, total=False):
    """Of `extract`."""

    images: int
    tcav_images: int
    n_segments: tuple[int, ...]
    compactness: float
    sigma_blur: float
    min_area: float
    jaccard: float
    fill: int
    clusters: int
    min_members: int
    max_members: int
    random_sets: int
    features: str
    cav: str
    gradient: str
    negatives: str
    null: str
    alpha: float
    top: int
    batch_size: int
    amp: str


class Stitching(TypedDict, total=False):
    """Of `stitch`."""

    sigma: float
    per_class: int
    order: str


class Pruning(TypedDict, total=False):
    """Of `prune`."""

    criterion: str
    variant: str
    rounds: int
    sparsity: float
    definition: str
    pattern: str
    min_layer_density: float
    protect: str
    like: str
    count: str
    material: str
    augment: str
    per_class: int
    batch_size: int
    precision: str


class Training(TypedDict, total=False):
    """Of `train` and `finetune`."""

    epochs: int
    lr: float
    schedule: str
    milestones: tuple[float, ...]
    warmup: float
    batch_size: int
    momentum: float
    nesterov: bool
    weight_decay: float
    label_smoothing: float
    ema: float
    augment: str
    random_erasing: float
    workers: int
    amp: str
    compile: str
    keep_every: int
    tensorboard: bool
    recipe: str
