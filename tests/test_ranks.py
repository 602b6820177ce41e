from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from together import together
from torch.distributed import HashStore

from dop_fast import ranks
from dop_fast.errors import RankError


class Made:
    """Numbers that can be asked for by place, which counts how many were."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> int:
        if at >= self.count:
            raise IndexError
        self.asked += 1
        return at


def everything() -> dict[str, object]:
    """Return what a rank sees of the world, after all has been called as all ranks must."""
    world, made = ranks.here(), Made(5)
    rows = torch.arange(float(2 * world.count)).view(world.count, 2) + 100 * world.rank
    came = ranks.swap(rows)
    share = ranks.share(list("abcde"))
    return {
        "world": (world.rank, world.count, world.beside, world.first),
        "share": list(share),
        "collected": "".join(ranks.collect(share)),
        "turns": list(ranks.turns(made)),
        "asked": made.asked,
        "streamed": list(ranks.turns(iter(range(5)), first=1)),
        "gathered": ranks.gather(world.rank),
        "once": ranks.once(lambda: f"rank {world.rank}"),
        "came": came.tolist(),
        "joined": ranks.join(came.sum(1)[:1]).tolist(),
        "mean": ranks.mean(torch.tensor([world.rank + 0.5])).item(),
        "differ": refusal(world.rank),
        "equal": refusal(0),
    }


def refusal(value: int) -> str:
    try:
        ranks.same(lambda: value, "the masks")
    except RankError as error:
        return error.message
    return ""


def test_two_ranks_share_what_there_is_and_know_what_the_other_knows() -> None:
    first, second = together(2, everything)
    assert first["world"] == (0, 2, 2, True) and second["world"] == (1, 2, 2, False)
    assert first["share"] == ["a", "c", "e"] and second["share"] == ["b", "d"]
    assert first["turns"] == [0, 2, 4] and second["turns"] == [1, 3, None]
    assert first["asked"] == 3 and second["asked"] == 2  # nothing is made for others
    assert first["streamed"] == [2, 4] and second["streamed"] == [3, None]
    assert first["came"] == [[0, 1], [100, 101]] and second["came"] == [[2, 3], [102, 103]]
    for rank in (first, second):
        assert rank["collected"] == "abcde"
        assert rank["gathered"] == [0, 1]
        assert rank["once"] == "rank 0"
        assert rank["joined"] == [1, 5]
        assert rank["mean"] == 1.0
        assert rank["differ"] == "the masks of rank 1 differ from those of rank 0"
        assert rank["equal"] == ""


def test_a_process_alone_is_a_world_of_one() -> None:
    alone = everything()
    assert alone["world"] == (0, 1, 1, True)
    assert alone["turns"] == [0, 1, 2, 3, 4] and alone["streamed"] == [1, 2, 3, 4]
    assert alone["collected"] == "abcde" and alone["once"] == "rank 0"
    assert alone["differ"] == alone["equal"] == ""
    values = torch.rand(1, 3)
    assert ranks.swap(values) is ranks.join(values) is ranks.mean(values) is values


def order(path: Path) -> bool:
    with ranks.first_alone():
        seen = path.exists()
        path.touch()
    return seen


def test_the_first_rank_is_through_before_the_others_start(tmp_path: Path) -> None:
    assert together(2, order, tmp_path / "begun") == [False, True]


def test_ranks_that_are_started_anew_meet_where_nothing_is_left_of_before() -> None:
    store = HashStore()
    worlds = [ranks.World(rank, 3) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            first, *others = pool.map(lambda world: ranks.begun(world, store), worlds)
            assert not first.check(["address"])
            first.set("address", "here")
            assert [other.get("address") for other in others] == [b"here"] * 2
