"""From scores to a mask, at once or in rounds that go on where they were interrupted.

Round t of T keeps the share p^(t/T) of all N weights, rounded: of the exponential schedule every
round removes the same share of what is left.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dop_fast import masks, models, ranks
from dop_fast.criteria import Criterion
from dop_fast.errors import ConfigError, StoreError
from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.seeding import derive
from dop_fast.types import Batches, Loss, Scores


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
    share that every layer, or each of the `protected` ones, keeps in any case.
    """

    density: float
    rounds: int = 1
    published: bool = False
    floor: float = 0.0
    protected: tuple[str, ...] | None = None


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


def rounds(job: Job, plan: Plan, path: Path, about: Mapping[str, Any]) -> Iterator[MaskSet]:
    """Yield the mask of each round; the last one is the result.

    After every round but the last the mask is stored beside `path`, and is where the same call,
    with an equal `about`, goes on; rounds of before are yielded as the last of them. The result
    is the same, bit for bit, on as many threads (see `engine`). A caller that has stored the
    result calls `forget`. Raises `RankError` where ranks come to different masks.
    """
    done, mask = ranks.once(partial(_begun, path, about))
    for number in range(1, plan.rounds + 1):
        if number > done:
            mask = select(job, plan, number, mask)
            ranks.same(partial(models.fingerprint, mask.masks), "the masks")
            if number < plan.rounds and ranks.here().first:
                state = {"round": number, "of": dict(about)}
                masks.save(_state(path), replace(mask, about=state))
        assert mask is not None  # the first round makes one, or one was begun
        yield mask


def select(job: Job, plan: Plan, number: int, mask: MaskSet | None) -> MaskSet:
    """Return the mask of one round, from that of the round before."""
    scores = job.scores(number, mask)
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
