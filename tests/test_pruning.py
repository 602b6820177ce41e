import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import chunks, residual
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dop_fast import criteria, masks, pruning
from dop_fast.engine import derivatives
from dop_fast.engine.sweeps import Recording
from dop_fast.errors import ConfigError
from dop_fast.masks import MaskSet
from dop_fast.models import prunable
from dop_fast.pruning import Job, Plan
from dop_fast.types import Scores

ROUNDS = ["force", "iter-snip", "synflow"]


def job(name: str, **knobs: Any) -> Job:
    return Job(criteria.load(name), residual(), chunks(8, 5), cross_entropy, 0, knobs)


def flat(mask: MaskSet) -> Tensor:
    return torch.cat([part.flatten() for part in mask.masks.values()])


@pytest.mark.parametrize(
    ("name", "count"),
    [("force", 60), ("iter-snip", 60), ("synflow", 100), ("snip", 1), ("grasp", 1)],
)
def test_a_criterion_has_its_own_number_of_rounds(name: str, count: int) -> None:
    assert pruning.rounds_of(criteria.load(name)) == count
    assert pruning.rounds_of(criteria.load(name), 7) == 7


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_a_criterion_that_sees_no_mask_takes_one_round(name: str) -> None:
    assert pruning.rounds_of(criteria.load(name), 1) == pruning.rounds_of(criteria.load(name)) == 1
    with pytest.raises(ConfigError, match="one round"):
        pruning.rounds_of(criteria.load(name), 7)


@pytest.mark.parametrize("name", ROUNDS)
def test_densities_fall_exponentially_and_end_exactly(name: str, tmp_path: Path) -> None:
    found = list(pruning.rounds(job(name), Plan(0.1, 5), tmp_path / "m", {}))
    total = found[0].total
    assert [mask.kept for mask in found] == [round(total * 0.1 ** (t / 5)) for t in range(1, 6)]


@pytest.mark.parametrize("name", ["iter-snip", "synflow", "snip", "grasp"])
def test_what_is_removed_stays_removed(name: str, tmp_path: Path) -> None:
    found = [flat(mask) for mask in pruning.rounds(job(name), Plan(0.1, 6), tmp_path / "m", {})]
    for before, after in itertools.pairwise(found):
        assert not (after & ~before).any()


def test_force_lets_weights_come_back(tmp_path: Path) -> None:
    found = [flat(mask) for mask in pruning.rounds(job("force"), Plan(0.1, 6), tmp_path / "m", {})]
    assert any((after & ~before).any() for before, after in itertools.pairwise(found))


def test_one_round_is_the_criterion_at_once(tmp_path: Path) -> None:
    work = job("snip")
    (mask,) = pruning.rounds(work, Plan(0.3), tmp_path / "m", {})
    assert torch.equal(flat(mask), flat(masks.keep_top(work.scores(1, None), 0.7)))
    (iterated,) = pruning.rounds(job("iter-snip"), Plan(0.3), tmp_path / "m", {})
    assert torch.equal(flat(mask), flat(iterated))
    assert not list(tmp_path.iterdir())


def test_each_round_scores_the_network_that_the_round_before_left(tmp_path: Path) -> None:
    work, plan = job("iter-snip"), Plan(0.1, 3)
    model = residual()
    for mask in pruning.rounds(work, plan, tmp_path / "m", {}):
        scores = criteria.load("snip").score(model, work.batches, cross_entropy, 0)
        alive = torch.cat([weight.detach().flatten() != 0 for weight in prunable(model).values()])
        values = torch.cat([score.flatten() for score in scores.values()])
        values[~alive] = -1
        best = values.argsort(descending=True, stable=True)[: mask.kept]
        assert torch.equal(flat(mask).nonzero()[:, 0], best.sort().values)
        masks.apply_(model, mask)


class Counting:
    """A criterion that counts its rounds and their seeds, and can be interrupted in one."""

    NEEDS_DATA = False

    def __init__(self, name: str, stop: int = 0) -> None:
        self.inner, self.stop, self.seeds = criteria.load(name), stop, list[int]()
        self.REVIVES = getattr(self.inner, "REVIVES", False)

    def score(
        self, model: nn.Module, batches: Any, loss: Any, seed: int, *,
        mask: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        if len(self.seeds) + 1 == self.stop:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        return self.inner.score(model, batches, loss, seed, mask=mask)


def counted(name: str, stop: int = 0) -> tuple[Job, Counting]:
    criterion = Counting(name, stop)
    return replace(job(name), criterion=criterion), criterion


def drain(steps: Iterable[MaskSet]) -> MaskSet:
    *_, last = steps
    return last


@pytest.mark.parametrize("name", ROUNDS)
def test_interrupted_rounds_go_on_to_the_same_mask(name: str, tmp_path: Path) -> None:
    plan, about = Plan(0.1, 5), {"seed": 0, "settings": {"list": [1, 2]}}
    whole = drain(pruning.rounds(job(name), plan, tmp_path / "whole", about))
    broken, _ = counted(name, stop=4)
    with pytest.raises(KeyboardInterrupt):
        drain(pruning.rounds(broken, plan, tmp_path / "m", about))
    assert [path.name for path in tmp_path.glob("m*")] == ["m.rounds"]

    again, criterion = counted(name)
    found = list(pruning.rounds(again, plan, tmp_path / "m", about))
    assert len(criterion.seeds) == 2
    assert len(found) == 5
    assert torch.equal(flat(found[-1]), flat(whole))
    pruning.forget(tmp_path / "m")
    assert not list(tmp_path.glob("m*"))


class Seen:
    """A track that keeps every label, and says how far it is."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.total = 0

    def __call__(self, items: Iterable[Any], label: Any, total: int) -> Iterator[Any]:
        self.total = total
        for item in items:
            self.labels.append(label(item))
            yield item


CHUNKS = (4, 5, 6)


@pytest.mark.parametrize(
    "name",  # SBP-SR takes no network without residual blocks
    [n for n in criteria.names() if criteria.load(n).NEEDS_DATA and n != "sbp-sr"],
)
def test_every_chunk_is_seen_as_often_as_a_round_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "free_bytes", lambda device: 0)  # nothing is kept in memory
    reads: list[int] = []

    class Read(list[Any]):
        def __getitem__(self, at: Any) -> Any:
            reads.append(at)
            return super().__getitem__(at)

    seen, work = Seen(), replace(job(name), batches=Read(chunks(*CHUNKS)))
    drain(pruning.rounds(work, Plan(0.5), tmp_path / "mask", {}, seen))
    passes = getattr(work.criterion, "PASSES", 1)
    assert reads == [*range(len(CHUNKS))] * passes
    assert seen.labels == ["mask"] * seen.total and seen.total == passes * len(CHUNKS)


def test_a_round_goes_on_behind_the_chunks_that_were_kept_in_memory(tmp_path: Path) -> None:
    seen, reached = Seen(), []

    class Kept:
        """Goes through all chunks, then through the last one again."""

        NEEDS_DATA, PASSES = True, 2

        def score(self, model: nn.Module, batches: Any, *rest: Any, mask: Any = None) -> Scores:
            for at in (0, 1, 2, 2):
                _ = batches[at]
                reached.append(len(seen.labels))
            return {name: weight.detach() for name, weight in prunable(model).items()}

    work = replace(job("snip"), criterion=Kept(), batches=chunks(*CHUNKS))
    drain(pruning.rounds(work, Plan(0.5, 2), tmp_path / "mask", {}, seen))
    assert reached == [1, 2, 3, 6, 7, 8, 9, 12]
    assert seen.labels[5:7] == ["mask, round 1 of 2", "mask, round 2 of 2"] and seen.total == 12


def test_chunks_that_grasp_kept_in_memory_are_seen_when_it_is_at_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reached, products = Seen(), [], Recording.products

    def spied(self: Recording, vectors: Any) -> Any:
        reached.append(len(seen.labels))
        return products(self, vectors)

    monkeypatch.setattr(Recording, "products", spied)
    work = replace(job("grasp"), batches=chunks(*CHUNKS))
    drain(pruning.rounds(work, Plan(0.5), tmp_path / "mask", {}, seen))
    assert reached == [4, 5, 6] and seen.total == 6


def test_rounds_that_are_done_are_not_seen_again(tmp_path: Path) -> None:
    broken, _ = counted("synflow", stop=4)
    with pytest.raises(KeyboardInterrupt):
        drain(pruning.rounds(broken, Plan(0.1, 5), tmp_path / "m", {}))
    seen = Seen()
    drain(pruning.rounds(job("synflow"), Plan(0.1, 5), tmp_path / "m", {}, seen))
    assert seen.labels == ["m, round 4 of 5", "m, round 5 of 5"]


def test_rounds_of_other_work_and_damaged_ones_start_anew(tmp_path: Path) -> None:
    plan, path = Plan(0.1, 4), tmp_path / "m"

    def rounds_taken(about: dict[str, Any]) -> int:
        work, criterion = counted("iter-snip")
        drain(pruning.rounds(work, plan, path, about))
        return len(criterion.seeds)

    assert [rounds_taken({"seed": 0}), rounds_taken({"seed": 0})] == [4, 1]
    assert rounds_taken({"seed": 1}) == 4
    (tmp_path / "m.rounds").write_bytes(b"\x00" * 9)
    assert rounds_taken({"seed": 1}) == 4


def test_each_round_has_a_seed_of_its_own_and_the_first_has_the_jobs(tmp_path: Path) -> None:
    work, criterion = counted("iter-snip")
    drain(pruning.rounds(work, Plan(0.1, 4), tmp_path / "m", {}))
    assert criterion.seeds[0] == work.seed
    assert len(set(criterion.seeds)) == 4


def test_sparsity_can_be_of_all_parameters() -> None:
    model = residual()
    weights = sum(weight.numel() for weight in prunable(model).values())
    everything = sum(value.numel() for value in model.parameters())
    for sparsity in (0.0, 0.3, 0.5, 0.777):
        share = pruning.density(model, sparsity, "all")
        mask = pruning.select(job("magnitude"), Plan(share), 1, None)
        assert weights - mask.kept == round(sparsity * everything)
        assert mask.overall_sparsity(model) == pytest.approx(sparsity, abs=0.501 / everything)
        of_weights = pruning.select(
            job("magnitude"), Plan(pruning.density(model, sparsity, "prunable")), 1, None
        )
        assert of_weights.kept == round(weights * (1 - sparsity))


def test_more_than_can_be_pruned_is_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match="can be pruned") as refused:
        pruning.density(residual(), 0.99, "all")
    limit = float(refused.value.hint.split()[4].rstrip(","))
    assert pruning.density(residual(), limit - 0.002, "all") > 0
