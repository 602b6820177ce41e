"""From scores to a mask, at once or in rounds that go on where they were interrupted.

Round t of T keeps the share p^(t/T) of all N weights, rounded: of the exponential schedule every
round removes the same share of what is left.
"""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, masks, models, ranks, reach
from dop_fast.config import PruneConfig
from dop_fast.criteria import Criterion
from dop_fast.errors import ConfigError, StoreError
from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.seeding import derive
from dop_fast.types import Batch, Batches, Loss, Scores, Track, untracked


@dataclass(frozen=True)
class Job:
    """What is scored, and how; `criterion.score` gets those of the knobs that it has."""

    criterion: Criterion
    model: nn.Module
    batches: Batches
    loss: Loss
    seed: int
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, number: int, mask: MaskSet | None) -> Scores:
        """Return the scores of a round, from 1 on; each later one has a seed of its own."""
        own = inspect.signature(self.criterion.score).parameters
        knobs = {name: value for name, value in self.knobs.items() if name in own}
        if mask is not None:
            knobs["mask"] = mask.masks
        seed = self.seed if number == 1 else derive(self.seed, "round", number)
        return self.criterion.score(self.model, self.batches, self.loss, seed, **knobs)


@dataclass(frozen=True)
class Plan:
    """`density`: the share of the prunable weights to keep, p. `rounds`: T.

    `published`: each round keeps as many as the criterion's published code would. `floor`: the
    share that every layer, or each of the `protected` ones, keeps in any case. `fours`: the
    2 best of every 4 inputs are kept, which makes about this density.
    """

    density: float
    rounds: int = 1
    published: bool = False
    floor: float = 0.0
    protected: tuple[str, ...] | None = None
    fours: bool = False


def of_model(
    model: nn.Module,
    batches: Batches,
    config: PruneConfig,
    *,
    seed: int = 0,
    loss: Loss = cross_entropy,
    image: Sequence[int] = (),
) -> MaskSet:
    """Return the mask of any network, without a workspace; the network is left as found.

    `batches` of images and labels, such as a DataLoader's, are read once, all of them, and held
    on the network's device. `image`: channels, height and width of an input; empty: those of the
    first batch. Settings that say what to score on are refused, with ConfigError.
    """
    own = PruneConfig()
    for name in ("material", "augment", "per_class", "batch_size", "like"):
        if getattr(config, name) != getattr(own, name):
            raise ConfigError(
                f"{name} is a setting of workspaces: a network is scored on the batches given",
                f"leave out {name}",
            )
    criterion = criteria.load(config.criterion, config.variant)
    device = next(model.parameters()).device
    held = [(images.to(device), labels.to(device)) for images, labels in batches]
    shape = tuple(image) or (tuple(held[0][0].shape[1:]) if held else ())
    made = plan(config, model, shape)
    knobs = {
        "precision": config.precision,
        "variant": config.variant,
        "image": shape,
        "sparsity": 1 - made.density,
    }
    job = Job(criterion, model, held, loss, seed, knobs)
    mask = None
    for number in range(1, made.rounds + 1):
        mask = select(job, made, number, mask)
    assert mask is not None  # a plan has a round or more
    about = {"criterion": config.criterion, "sparsity": mask.sparsity, "seed": seed}
    return replace(mask, about=about)


def plan(config: PruneConfig, model: nn.Module, image: Sequence[int]) -> Plan:
    """Return how many weights of a model, whose inputs are `image`, each round keeps.

    `image`: channels, height and width. Raises ConfigError and ModelError where the model cannot
    be pruned so; computes no score.
    """
    criterion = criteria.load(config.criterion, config.variant)
    if config.count != "exact" and config.variant != "published":
        raise ConfigError("only published code has a published count", "add --variant published")
    if config.pattern != "none":
        return _pattern(config, criterion, model)
    share, protected = density(model, config.sparsity, config.definition), None
    criteria.check(criterion, model, 1 - share)
    if config.min_layer_density and config.protect != "all":
        protected = tuple(reach.sensitive(model, image))
    return Plan(
        share,
        rounds_of(criterion, config.rounds),
        published=config.count == "published",
        floor=config.min_layer_density,
        protected=protected,
    )


def _pattern(config: PruneConfig, criterion: Criterion, model: nn.Module) -> Plan:
    """Return the plan of one round, scored on the whole network, that leaves 2 of every 4."""
    own = PruneConfig()
    for name in ("rounds", "definition", "min_layer_density", "count", "like"):
        if getattr(config, name) != getattr(own, name):
            raise ConfigError(
                f"--pattern {config.pattern} alone says how many weights stay",
                f"leave out --{name.replace('_', '-')}",
            )
    weights = prunable(model).values()
    halved = sum(weight.numel() for weight in weights if masks.has_fours(weight))
    share = 1 - halved / 2 / max(1, sum(weight.numel() for weight in weights))
    criteria.check(criterion, model, 1 - share)
    return Plan(share, fours=True)


def rounds_of(criterion: Criterion, asked: int = 0) -> int:
    """Return how many rounds a criterion takes; `asked` 0: its own number.

    ConfigError for several of one that does not look at the mask, and gives the same in each.
    """
    if asked > 1 and "mask" not in inspect.signature(criterion.score).parameters:
        raise ConfigError(
            "the criterion does not look at what earlier rounds left, so it has one round",
            "leave --rounds out, or take one that does, such as iter-snip",
        )
    return asked or getattr(criterion, "ROUNDS", 1)


def density(model: nn.Module, sparsity: float, definition: str) -> float:
    """Return the share of the prunable weights to keep for a `sparsity` of them, or of all.

    Of all, exactly round(sparsity * all) go. ConfigError where not so many can be pruned.
    """
    if definition == "prunable":
        return 1 - sparsity
    everything = sum(value.numel() for value in model.parameters())
    weights = sum(weight.numel() for weight in prunable(model).values())
    removed = round(sparsity * everything)
    if removed >= weights:
        raise ConfigError(
            f"sparsity {sparsity:g} of all {everything} parameters would remove {removed}, of "
            f"which only {weights} can be pruned",
            f"ask for less than {weights / everything:.4f}, or for --definition prunable",
        )
    return (weights - removed) / weights


def rounds(
    job: Job, plan: Plan, path: Path, about: Mapping[str, Any], track: Track = untracked
) -> Iterator[MaskSet]:
    """Yield the mask of each round; the last one is the result.

    After every round but the last the mask is stored beside `path`, and is where the same call,
    with an equal `about`, goes on; rounds of before are yielded as the last of them. The result
    is the same, bit for bit (see `engine`). A caller that has stored it calls `forget`. Raises
    `RankError` where ranks come to different masks. `track` sees chunks being read.
    """
    done, mask = ranks.once(partial(_begun, path, about))
    reading = _Reading(job, range(done, plan.rounds), track, path.stem)
    for number in range(1, plan.rounds + 1):
        if number > done:
            mask = select(replace(job, batches=reading.begin(number)), plan, number, mask)
            ranks.same(partial(models.fingerprint, mask.masks), "the masks")
            if number < plan.rounds and ranks.here().first:
                state = {"round": number, "of": dict(about)}
                masks.save(_state(path), replace(mask, about=state))
        assert mask is not None  # the first round makes one, or one was begun
        yield mask


class _Reading:
    """Batches that `track` sees being read, round after round.

    A round works on each chunk as often as the criterion has `PASSES`. The place of a chunk counts,
    not how many were read before: of a job's ranks each has only some.
    """

    def __init__(self, job: Job, rounds: range, track: Track, what: str) -> None:
        self._batches = cast(Any, job.batches)
        counts = job.criterion.NEEDS_DATA and isinstance(job.batches, ranks.Indexed)
        self._chunks = len(self._batches) if counts else 0
        self._size = max(1, self._chunks * getattr(job.criterion, "PASSES", 1))
        self._first, self._round, self._begun = rounds.start + 1, 0, 0
        self._times: Counter[int] = Counter()
        last, total = rounds.stop, self._size * len(rounds)

        def label(step: int) -> str:
            number = self._first + step // self._size
            return f"{what}, round {number} of {last}" if last > 1 else what

        self._steps = iter(track(range(total), label, total))

    def begin(self, number: int) -> Batches:
        """Return the batches of a round."""
        self._round = number - self._first
        self._times.clear()
        self._reach(0)
        return self if self._chunks else cast(Batches, self._batches)

    def __len__(self) -> int:
        return self._chunks

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(self._chunks))

    def __getitem__(self, at: int) -> Batch:
        self.again(at)
        found: Batch = self._batches[at]
        return found

    def again(self, at: int) -> None:
        """Go on to a chunk, which is read or was kept in memory."""
        self._reach(self._times[at] * self._chunks + at)
        self._times[at] += 1

    def _reach(self, step: int) -> None:
        """Go on to a step of this round."""
        while self._begun <= self._round * self._size + min(step, self._size - 1):
            next(self._steps)
            self._begun += 1


def select(job: Job, plan: Plan, number: int, mask: MaskSet | None) -> MaskSet:
    """Return the mask of one round, from that of the round before."""
    scores = job.scores(number, mask)
    if plan.fours:
        return masks.keep_two_of_four(scores)
    if mask is not None and not getattr(job.criterion, "REVIVES", False):
        scores = {
            name: score.masked_fill(
                ~mask.masks[name].to(score.device), torch.finfo(score.dtype).min
            )
            for name, score in scores.items()
        }
    share = plan.density ** (number / plan.rounds)
    kept = getattr(job.criterion, "kept", None)
    if plan.published and kept is not None:
        total = sum(score.numel() for score in scores.values())
        share = max(1, kept(scores, share)) / total
    return masks.keep_top(scores, 1 - share, plan.floor, plan.protected)


def forget(path: Path) -> None:
    """Remove what interrupted rounds left beside the mask at `path`."""
    _state(path).unlink(missing_ok=True)


def _state(path: Path) -> Path:
    return path.with_name(f"{path.name}.rounds")


def _begun(path: Path, about: Mapping[str, Any]) -> tuple[int, MaskSet | None]:
    """Return the last round that is done of the same work, 0 if none, and its mask."""
    try:
        state = masks.load(_state(path))
    except StoreError:  # none, or damaged: nothing is lost that cannot be made again
        return 0, None
    if state.about.get("of") != dict(about):
        return 0, None
    return state.about["round"], state
