"""Every setting, once: name, type, default, range and help.

The TOML file, the command-line options and the Python functions all take their settings from
these classes. A value out of range raises `ConfigError` wherever it came from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from dop_fast import recipes
from dop_fast.errors import ConfigError
from dop_fast.settings import StageConfig, setting

SMALL_SIDE = 64
"""Images of up to this many pixels are treated as CIFAR's are, larger ones as ImageNet's."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig(StageConfig):
    """Where the images are and how they enter a network."""

    path: str = setting(
        "", "folder of classes, zip of one, folder of datasets' save_to_disk, or the name of a "
        "torchvision data set"
    )  # fmt: skip
    size: int = setting(224, "images enter the network as size x size pixels", low=8)
    val_share: float = setting(
        0.2, "share held out where there is no val/ folder", low=0, high=1, open_low=True,
        open_high=True,
    )  # fmt: skip
    mean: tuple[float, ...] = setting(IMAGENET_MEAN, "mean of R, G, B in [0, 1]")
    std: tuple[float, ...] = setting(IMAGENET_STD, "standard deviation of R, G, B")


@dataclass(frozen=True)
class TeacherConfig(StageConfig):
    """The trained classifier whose concepts are extracted."""

    name: str = setting("resnet18", "architecture")
    weights: str = setting(
        "", "file of weights; DEFAULT: torchvision's own; empty: not trained yet"
    )
    layer: str = setting("", "bottleneck layer l, by module name; empty: the penultimate one")


@dataclass(frozen=True)
class ModelConfig(StageConfig):
    """The network that is pruned and trained."""

    name: str = setting("resnet18", "architecture")


@dataclass(frozen=True)
class ExtractConfig(StageConfig):
    """ACE (Ghorbani et al., 2019), per class."""

    images: int = setting(50, "images of a class to discover concepts in", low=4)
    tcav_images: int = setting(50, "further images of the class to score concepts on", low=1)
    n_segments: tuple[int, ...] = setting(
        (), "SLIC resolutions; none: 15,50,80, or 5,10,15 up to 64 px", low=1, panel="Segments"
    )
    compactness: float = setting(20.0, "SLIC compactness", low=0, open_low=True, panel="Segments")
    sigma_blur: float = setting(1.0, "blur before SLIC, in pixels", low=0, panel="Segments")
    min_area: float = setting(
        0.001, "smallest segment, as a share of the image", low=0, high=1, panel="Segments"
    )
    jaccard: float = setting(
        0.5, "drop a segment that overlaps one of an earlier resolution by more", low=0, high=1,
        panel="Segments",
    )  # fmt: skip
    fill: int = setting(117, "grey value around a segment", low=0, high=255, panel="Segments")
    clusters: int = setting(25, "K-means clusters of a class", low=1, panel="Concepts")
    min_members: int = setting(20, "segments a cluster needs", low=2, panel="Concepts")
    max_members: int = setting(40, "segments kept, nearest to the centre", low=2, panel="Concepts")
    random_sets: int = setting(
        20, "random sets that concepts are held against", low=2, panel="Concepts"
    )
    features: str = setting(
        "exact", "a forward of each segment as in ACE; roi: of the whole image, pooled under masks",
        choices=("exact", "roi"), panel="Concepts",
    )  # fmt: skip
    cav: str = setting(
        "ridge", "linear separator: closed-form ridge, or SGD as published",
        choices=("ridge", "sgd"), panel="Concepts",
    )  # fmt: skip
    gradient: str = setting(
        "logprob", "direction that counts: of log p(class) or of its logit",
        choices=("logprob", "logit"), panel="Concepts",
    )  # fmt: skip
    negatives: str = setting(
        "segments", "what random sets are made of: segments or whole photos of other classes",
        choices=("segments", "photos"), panel="Concepts",
    )  # fmt: skip
    null: str = setting(
        "half", "scores to beat: 0.5, what chance gives, or those of one random concept as in ACE",
        choices=("half", "random"), panel="Concepts",
    )  # fmt: skip
    alpha: float = setting(
        0.01, "significance level of the TCAV test", low=0, high=1, open_low=True, panel="Concepts"
    )
    top: int = setting(
        5, "concepts kept of each class, most important first", low=1, panel="Concepts"
    )
    batch_size: int = setting(128, "segments in one forward pass", low=1, panel="Compute")
    amp: str = setting(
        "auto", "autocast: bf16 where the device computes in it, off elsewhere",
        choices=("auto", "bf16", "off"), panel="Compute",
    )  # fmt: skip


@dataclass(frozen=True)
class StitchConfig(StageConfig):
    """Super Stitching, Algorithm 2."""

    sigma: float = setting(
        0.75, "coverage threshold of a stitched patch", low=0, high=1, open_low=True,
        open_high=True,
    )  # fmt: skip
    per_class: int = setting(10, "stitched patches of each class", low=1)
    order: str = setting(
        "round", "which segment is on top: the literal rounds, or one order of importance",
        choices=("round", "importance"),
    )  # fmt: skip


MATERIALS = (
    "stitched", "patches", "images", "images-random", "random-segments", "less-patch", "ones",
    "grey", "noise", "patches-blurred", "stitched-blurred", "patches-reversed",
    "stitched-reversed", "stitched-permuted", "patches-permuted", "images-permuted",
)  # fmt: skip
"""What weights are scored on: see `patches.material`."""


def _augment() -> str:
    return setting(
        "none", "of material; published: random resized crop and flip, guaranteed: one that shows "
        "part of the patch", choices=("none", "published", "guaranteed"), panel="Data",
    )  # fmt: skip


@dataclass(frozen=True)
class PruneConfig(StageConfig):
    """One-shot pruning at initialisation, Algorithm 1, lines 2 to 4."""

    criterion: str = setting("grasp", "how weights are scored")
    variant: str = setting(
        "clean", "clean: the weights that are trained; published: the rule of its authors' code",
        choices=("clean", "published"),
    )  # fmt: skip
    rounds: int = setting(
        0, "rounds of scoring and removing, sparsity rising exponentially; 0: the criterion's own",
        low=0,
    )  # fmt: skip
    sparsity: float = setting(0.9, "share of the weights to remove", low=0, high=1, open_high=True)
    definition: str = setting(
        "prunable", "of what sparsity is a share: prunable weights, or all parameters (the paper)",
        choices=("prunable", "all"),
    )  # fmt: skip
    pattern: str = setting(
        "none", "2:4: of every 4 consecutive inputs the best 2, in place of a sparsity",
        choices=("none", "2:4"),
    )  # fmt: skip
    min_layer_density: float = setting(
        0.0, "share that every layer keeps in any case; 0: a layer may lose all", low=0, high=1
    )
    protect: str = setting(
        "all", "layers that keep it; ends: the first, the last and shortcuts",
        choices=("all", "ends"),
    )  # fmt: skip
    like: str = setting("", "a mask whose layers' densities are kept, the places in them by lot")
    count: str = setting(
        "exact", "weights kept: the share asked for, or as published code rounds and breaks ties",
        choices=("exact", "published"),
    )  # fmt: skip
    material: str = setting(
        "auto", "what weights are scored on; auto: stitched patches if there are any, else patches",
        choices=("auto", *MATERIALS), panel="Data",
    )  # fmt: skip
    augment: str = _augment()
    per_class: int = setting(10, "material of each class", low=1, panel="Data")
    batch_size: int = setting(
        100, "chunk: batch norm takes its statistics over this many; 0: as many as memory holds, "
        "and then the mask depends on the machine", low=0, panel="Data",
    )  # fmt: skip
    precision: str = setting(
        "exact", "of derivatives; fast: bf16 after an exact forward, of the same quality",
        choices=("exact", "fast"), panel="Compute",
    )  # fmt: skip


@dataclass(frozen=True)
class SanityConfig(StageConfig):
    """Controls of masks, and how far scores on other items agree; nothing is trained."""

    criterion: tuple[str, ...] = setting(
        ("snip", "grasp"), "how weights are scored; several with commas"
    )
    material: tuple[str, ...] = setting(
        ("available",), "what weights are scored on, as for prune; available: images, and patches "
        "and stitched where there are any", panel="Data",
    )  # fmt: skip
    sparsity: float = setting(
        0.9, "share of the prunable weights to remove", low=0, high=1, open_high=True
    )
    target: float = setting(
        0.9, "cosine of a mask that is called stable", low=0, high=1, open_low=True, open_high=True
    )
    start: int = setting(
        100, "items of a half to start with, doubled from there; rounded to equally many of each "
        "class", low=2, panel="Data",
    )  # fmt: skip
    augment: str = _augment()
    budget: int = setting(800, "items of both halves together, at most", low=4, panel="Data")
    splits: int = setting(3, "times that the photographs are halved anew", low=1, panel="Data")
    per_class: int = setting(10, "items of each class that controls are scored on", low=1,
                             panel="Data")  # fmt: skip
    batch_size: int = setting(
        100, "chunk: batch norm takes its statistics over this many", low=2, panel="Data"
    )
    precision: str = setting(
        "exact", "of derivatives; fast: bf16 after an exact forward, of the same quality",
        choices=("exact", "fast"), panel="Compute",
    )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(StageConfig):
    """SGD with the paper's recipe: 120 epochs, 0.1, divided by 10 at 30, 60 and 90.

    `from_dict` knows one key more: `recipe`, the name of `dop_fast.recipes` to take what is not
    given from.
    """

    epochs: int = setting(120, "passes over the training images", low=1, panel="Schedule")
    lr: float = setting(0.1, "learning rate", low=0, open_low=True, panel="Schedule")
    schedule: str = setting(
        "steps", "how the rate falls: tenfold at each milestone, or as half a cosine to zero",
        choices=("steps", "cosine"), panel="Schedule",
    )  # fmt: skip
    milestones: tuple[float, ...] = setting(
        (0.25, 0.5, 0.75), "shares of the epochs after which the rate falls tenfold",
        low=0, high=1, panel="Schedule",
    )  # fmt: skip
    warmup: float = setting(
        0.0, "share of the epochs over which the rate rises from zero", low=0, high=1,
        panel="Schedule",
    )  # fmt: skip
    batch_size: int = setting(128, "images in a step", low=1, panel="Schedule")
    momentum: float = setting(0.9, "SGD momentum", low=0, high=1, open_high=True, panel="Schedule")
    nesterov: bool = setting(False, "Nesterov's momentum", panel="Schedule")
    weight_decay: float = setting(1e-4, "L2 penalty on all parameters", low=0, panel="Schedule")
    label_smoothing: float = setting(
        0.0, "share of each label that is spread over all classes", low=0, high=1,
        open_high=True, panel="Schedule",
    )  # fmt: skip
    ema: float = setting(
        0.0, "decay a step, such as 0.999, of a running average of the weights, which is measured "
        "and saved beside them; 0: none", low=0, high=1, open_high=True, panel="Schedule",
    )  # fmt: skip
    augment: str = setting(
        "auto", "auto: pad up to 64 px, else resized; each with a flip",
        choices=("auto", "pad", "resized", "none"), panel="Data",
    )  # fmt: skip
    random_erasing: float = setting(
        0.0, "share of the images that lose a random box, to the mean colour", low=0, high=1,
        panel="Data",
    )  # fmt: skip
    workers: int = setting(
        -1, "processes that load images; 0: this one; -1: a GPU's share of the cores, 16 at most, "
        "none on a CPU, which training keeps busy anyway", low=-1, panel="Data",
    )  # fmt: skip
    amp: str = setting(
        "auto", "autocast: bf16 where the device computes in it, else fp16 on a GPU, off on a CPU",
        choices=("auto", "bf16", "fp16", "off"), panel="Compute",
    )  # fmt: skip
    compile: str = setting(
        "off", "torch.compile of forward and backward; graphs: with CUDA graphs",
        choices=("off", "on", "graphs"), panel="Compute",
    )  # fmt: skip
    keep_every: int = setting(
        0, "keep the weights of every so many epochs; 0: of the best and the last", low=0,
        panel="Output",
    )  # fmt: skip
    tensorboard: bool = setting(
        False, "write event files for TensorBoard into the run's folder", panel="Output"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ConfigError("Nesterov's momentum needs a momentum", "try --momentum 0.9")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from TOML values, and from those of a recipe where they name one."""
        own = dict(values)
        start = recipes.read(own.pop("recipe")) if "recipe" in own else {}
        return super().from_dict({**start, **own}, where)
