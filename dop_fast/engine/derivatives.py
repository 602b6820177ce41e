"""Gradients and Hessian products, chunk by chunk."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from threading import Event, local
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from dop_fast import ranks, threads
from dop_fast.engine.autograd import ByAutograd
from dop_fast.engine.memory import free_bytes
from dop_fast.engine.sweeps import Recording
from dop_fast.engine.tape import Slope, Unsupported
from dop_fast.errors import DataError, ModelError
from dop_fast.models import prunable, twin
from dop_fast.types import Batch, Batches, Loss, Watched

Precision: TypeAlias = Literal["exact", "fast"]
"""exact: in the model's type throughout. fast: the forward so, all after it in bfloat16, sums in
float32; with the ReLUs and statistics of the exact forward that is of float32's own quality."""


class Nothing:
    """What a rank has in the last round of chunks when there are no more."""

    def gradient(self, *, keep: bool) -> dict[str, Slope]:
        return {}

    def products(self, vectors: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Slope]]:
        return [{} for _ in vectors]

    def saved_bytes(self) -> int:
        return 0


Chunk: TypeAlias = Recording | ByAutograd | Nothing
R = TypeVar("R")
SHARE = 0.25
"""Of the free memory: for forwards kept between the two passes, and for those worked on at once."""

_SWITCHES = tuple(
    attrgetter(path)(torch.backends)
    for path in ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
)


def gradients(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    precision: Precision = "exact",
    *,
    names: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return g, the gradient of the mean loss, for each prunable weight in its shape.

    With `names`, for these parameters instead. Raises `ModelError` where it is not finite,
    `DataError` where there is no sample.
    """
    with _scene(model, loss, precision, names) as scene:
        mean = _Mean(scene.weights)
        for slopes, count in scene.each(batches, lambda chunk: chunk.gradient(keep=False)):
            mean.add(slopes, count)
            del slopes
        return mean.finite("the gradient")


def hessian_gradient(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    precision: Precision = "exact",
    *,
    keep: bool = True,
) -> dict[str, Tensor]:
    """Return Hg, the Hessian of the mean loss times its gradient, for each prunable weight.

    H and g are those of the prunable weights alone. Goes through the batches twice, but for the
    chunks whose forward finds room in memory until the second time (`keep`). Raises as
    `gradients`.
    """
    with _scene(model, loss, precision) as scene:
        kept: list[tuple[Chunk, int]] = []
        slope, product = _Mean(scene.weights), _Mean(scene.weights)
        room = SHARE * free_bytes(scene.device) if keep else 0.0

        def first(chunk: Chunk) -> tuple[Chunk | None, dict[str, Slope]]:
            hold = room > 0
            slopes = chunk.gradient(keep=hold)
            return chunk if hold else None, slopes

        for (chunk, slopes), count in scene.each(batches, first):
            slope.add(slopes, count)
            if chunk is not None and slope.rounds == len(kept) + 1:
                kept.append((chunk, count))
                # those worked on meanwhile need as much again, and the next ones
                room -= chunk.saved_bytes()
                room = room if room > 2 * threads.width() * chunk.saved_bytes() else 0
            del chunk, slopes
        g, done = slope.finite("the gradient"), len(kept)

        def second(chunk: Chunk) -> dict[str, Slope]:
            return chunk.products([g])[0]

        # in order: sums must not depend on the memory that is free
        again = threads.spread(lambda pair: (second(pair[0]), pair[1]), _held(kept, batches))
        rest = scene.each(batches, second, done) if done < slope.rounds else ()
        for slopes, count in chain(again, rest):
            product.add(slopes, count)
            del slopes
        return product.finite("the Hessian's product with the gradient")


def _held(kept: list[tuple[Chunk, int]], batches: Batches) -> Iterator[tuple[Chunk, int]]:
    """Yield the chunks that were kept and their sizes, and forget them."""
    world = ranks.here()
    for number in range(len(kept)):
        if isinstance(batches, Watched):
            batches.again(number * world.count + world.rank)
        yield kept.pop(0)


def hessian_products(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    vectors: Sequence[Mapping[str, Tensor]],
    precision: Precision = "exact",
) -> list[dict[str, Tensor]]:
    """Return Hv for each vector v, which is given and returned by parameter.

    H is by the parameters that the vectors name, prunable or not. The vectors share each chunk's
    forward and adjoint. Raises as `gradients`.
    """
    with _scene(model, loss, precision, vectors[0]) as scene:
        means = [_Mean(scene.weights) for _ in vectors]
        for products, count in scene.each(batches, lambda chunk: chunk.products(vectors)):
            for mean, slopes in zip(means, products, strict=True):
                mean.add(slopes, count)
            del products, slopes
        return [mean.finite("the Hessian's product") for mean in means]


def samples_that_fit(
    model: nn.Module, image: Sequence[int], loss: Loss, precision: Precision = "exact"
) -> int:
    """Return how many images [channels height width] a chunk may hold in that free memory's share.

    At least 2, of which batch norm has a variance.
    """
    with _scene(model, loss, precision) as scene:
        sizes = []
        for count in (2, 4):
            chunk = scene.chunk(torch.zeros(count, *image), torch.zeros(count, dtype=torch.int64))
            chunk.gradient(keep=True)
            sizes.append(chunk.saved_bytes())
        # values and adjoints; their tangents take as much again
        each = max(sizes[1] - sizes[0], 1)
        return min(ranks.gather(max(2, int(SHARE * free_bytes(scene.device) / each))))


class _Mean:
    """The mean over samples, of which chunks bring theirs.

    Of every weight's sum a rank holds a part, and each rank hands it that part of its own chunk's.
    So sums are taken in the order of the chunks: the same bits for any number of ranks.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._like, self._ranks = like, ranks.here().count
        self._sums = {
            name: weight.new_zeros(-(-weight.numel() // self._ranks))
            for name, weight in like.items()
        }
        self._count = self.rounds = 0

    def add(self, slopes: Mapping[str, Slope], count: int) -> None:
        """Add a round: the means over this rank's chunk of `count` samples, if it has one."""
        for name, weight in self._like.items():
            rows = weight.new_empty(self._ranks, len(self._sums[name]))
            slope = slopes.get(name)
            if slope is None:
                rows.zero_()
            else:  # not add_(slope, alpha=count), whose rounding depends on where a value lies
                _shaped(rows, weight).copy_(slope).mul_(count)
            for part in ranks.swap(rows):
                self._sums[name] += part
        self._count += count
        self.rounds += 1

    def finite(self, what: str) -> dict[str, Tensor]:
        """Return it, if there is one."""
        count = sum(ranks.gather(self._count))
        if not count:
            raise DataError("the batches hold no samples to score weights on", "give at least one")
        means = {
            name: _shaped(ranks.join(self._sums.pop(name)), weight).div_(count)
            for name, weight in self._like.items()
        }
        wrong = [name for name, value in means.items() if not bool(value.isfinite().all())]
        if wrong:
            raise ModelError(
                f"{what} is not finite in {len(wrong)} of {len(means)} layers, first in {wrong[0]}",
                "check that images are normalised and that the weights are those of a fresh model",
            )
        return means


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    """Return as many values as `like` has in its shape and memory layout, a view."""
    return values.as_strided(like.shape, like.stride())


@dataclass(frozen=True)
class _Scene:
    """A model's prunable weights, and how a chunk's loss depends on them.

    `sizes`: what each chunk so far holds in memory; one is `known`.
    """

    weights: dict[str, Tensor]
    run: Callable[[Tensor, Tensor], Tensor]
    low: torch.dtype | None
    room: float
    sizes: list[int] = field(default_factory=list)
    known: Event = field(default_factory=Event)

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def each(
        self, batches: Batches, work: Callable[[Chunk], R], first: int = 0
    ) -> Iterator[tuple[R, int]]:
        """Yield `work` of this rank's chunk of each round, from round `first` on, and its size.

        On a CPU several chunks are worked on at once, as far as there is memory for them.
        """
        if iter(batches) is batches:
            raise DataError(
                "the batches can be gone through only once", "give a list, not a generator"
            )

        def one(batch: "Batch | None") -> tuple[R, int]:
            if batch is None:
                return work(Nothing()), 0
            images, labels = batch
            try:
                chunk = self.chunk(images, labels)
            finally:
                self.known.set()  # or never will be
            return work(chunk), len(labels)

        return threads.spread(one, ranks.turns(batches, first), self._at_once)

    def chunk(self, images: Tensor, labels: Tensor) -> Chunk:
        """Run a chunk forward."""
        run = partial(self.run, _dense(images.to(self.device)), labels.to(self.device))
        try:
            recording = Recording(run, self.weights, self.low)
        except Unsupported:
            self.sizes.append(sys.maxsize)
            return ByAutograd(run, self.weights)
        self.sizes.append(recording.saved_bytes())
        return recording

    def _at_once(self) -> int:
        """Return how many chunks there is memory for; waits for the first one's forward."""
        self.known.wait()
        return int(self.room / (2 * max(self.sizes, default=1)))


def _dense(tensor: Tensor) -> Tensor:
    """Return the same values without gaps, as convolutions are fastest on: channels last."""
    images = tensor.dim() == 4
    layout = torch.channels_last if images else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


@contextmanager
def _scene(
    model: nn.Module, loss: Loss, precision: Precision, names: Collection[str] = ()
) -> Iterator[_Scene]:
    """Set the stage: the model keeps its weights, gradients, buffers and, afterwards, its modes."""
    found = prunable(model)
    if not found:
        raise ModelError(
            "the model has no prunable weights", "it needs a convolution or a linear layer"
        )
    others = {name: value.detach() for name, value in model.named_parameters()}
    weights = {name: _dense(others[name]) for name in names or found}

    own = local()
    own.model = model  # this thread's

    def run(images: Tensor, labels: Tensor) -> Tensor:
        # copies: batch norm must not move the running statistics of the model
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if not hasattr(own, "model"):
            own.model = twin(model)
        return loss(functional_call(own.model, {**others, **weights, **buffers}, (images,)), labels)

    modes = {module: module.training for module in model.modules()}
    device = next(iter(weights.values())).device
    low = torch.bfloat16 if precision == "fast" else None
    try:
        for module in modes:
            module.training = isinstance(module, _BatchNorm)
        steady = threads.single() if device.type == "cpu" else nullcontext()
        autocast = torch.autocast(device.type, enabled=False)
        with steady, _full_precision(), autocast, _derivable():
            yield _Scene(weights, run, low, SHARE * free_bytes(device))
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _derivable() -> Iterator[None]:
    """Switch off fused attention, which has no second derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off: it changes what GraSP keeps of a ResNet-50, at 95 % to a Jaccard of .45."""
    found = [switch.fp32_precision for switch in _SWITCHES]
    try:
        for switch in _SWITCHES:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(_SWITCHES, found, strict=True):
            switch.fp32_precision = precision
