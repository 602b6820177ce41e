"""Scores and masks of several ranks, which deal out the chunks: to the bit those of one process."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import Batches, chunks, residual
from together import together
from torch import Tensor
from torch.nn.functional import cross_entropy

from dop_fast import criteria, engine, models, pruning, ranks
from dop_fast.errors import RankError
from dop_fast.patches.material import Material
from dop_fast.types import Array, Batch

SIZES = (5, 4, 4, 3, 4)
"""Of chunks: more than ranks, and not all of one size."""
KNOBS: dict[str, Any] = {"image": (3, 6, 6), "sparsity": 0.6, "samples": 6, "draws": 2}


def masked(name: str, variant: str, batches: Batches) -> tuple[dict[str, Tensor], str]:
    """Return a criterion's first scores, and a fingerprint of the mask of its last round."""
    criterion, model = criteria.load(name, variant), residual()
    like = {key: weight.detach() > 0 for key, weight in models.prunable(model).items()}
    given = batches if criterion.NEEDS_DATA else []
    job = pruning.Job(
        criterion, model, given, cross_entropy, 0, {**KNOBS, "variant": variant, "like": like}
    )
    plan = pruning.Plan(0.4, min(2, pruning.rounds_of(criterion)))
    with tempfile.TemporaryDirectory() as folder:
        *_, mask = pruning.rounds(job, plan, Path(folder) / "mask.safetensors", {})
    return job.scores(1, None), models.fingerprint(mask.masks)


def every_way(batches: Batches) -> dict[str, tuple[str, str]]:
    found = {}
    for name in criteria.names():
        if name == "sbp-sr":  # SNIP's scores, of residual blocks of a known kind
            continue
        for variant in getattr(criteria.load(name), "VARIANTS", ("clean",)):
            scores, mask = masked(name, variant, batches)
            found[f"{name} {variant}"] = models.fingerprint(scores), mask
    return found


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_criterion_gives_the_bits_of_one_process(count: int) -> None:
    alone = every_way(chunks(*SIZES))
    assert len(alone) > 15
    assert together(count, every_way, chunks(*SIZES)) == [alone] * count


def hessians(keep: bool) -> dict[str, Tensor]:
    return engine.hessian_gradient(residual(), chunks(*SIZES), cross_entropy, keep=keep)


def test_the_second_pass_may_run_forward_again_on_each_rank() -> None:
    (alone,) = together(1, hessians, True)
    for keep in (True, False):
        for found in together(2, hessians, keep):
            assert all(torch.equal(found[name], value) for name, value in alone.items())


def made_chunks() -> list[int]:
    asked: list[int] = []
    given = chunks(*SIZES)

    def make(items: Array) -> Batch:
        asked.extend(items)
        return given[items[0]]

    material = Material(tuple(np.arange(len(SIZES))[:, None]), make)
    engine.gradients(residual(), material, cross_entropy)
    return asked


def test_a_rank_makes_its_own_chunks_of_the_material_alone() -> None:
    assert together(2, made_chunks) == [[0, 2, 4], [1, 3]]


def other_networks() -> str:
    model = residual()
    with torch.no_grad():
        model.conv.weight.add_(ranks.here().rank)
    job = pruning.Job(criteria.load("magnitude"), model, (), cross_entropy, 0)
    try:
        list(pruning.rounds(job, pruning.Plan(0.4), Path("unused"), {}))
    except RankError as error:
        return error.message
    return "no error"


def test_ranks_with_different_masks_are_an_error() -> None:
    found = together(2, other_networks)
    assert found == ["the masks of rank 1 differ from those of rank 0"] * 2
