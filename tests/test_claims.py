"""Who works on what: one of several processes at a time, whatever becomes of them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dop_fast import claims as claims_module
from dop_fast.claims import STALE_S, Claims


def test_one_of_two_claims_wins_and_the_other_may_follow_when_it_is_given_back(
    tmp_path: Path,
) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take("a-0.9")
    assert claim is not None and second.take("a-0.9") is None
    assert second.take("a-0.95") is not None  # another key
    with claim:
        assert claim.held and str(os.getpid()) in second.holder("a-0.9")
    assert second.holder("a-0.9") == "" and second.take("a-0.9") is not None


def test_a_claim_is_given_back_when_the_work_is_interrupted(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    claim = claims.take("a")
    assert claim is not None
    with pytest.raises(KeyboardInterrupt), claim:
        raise KeyboardInterrupt
    assert list(tmp_path.glob("*.claim")) == []


def test_the_claim_of_another_machine_is_taken_over_after_the_stated_time_and_not_before(
    tmp_path: Path,
) -> None:
    claims = Claims(tmp_path)
    lost = claims.take("a")
    assert lost is not None
    owner = json.loads(lost.path.read_text(encoding="utf-8"))
    lost.path.write_text(json.dumps({**owner, "machine": "elsewhere"}), encoding="utf-8")
    for age, free in ((STALE_S - 30, False), (STALE_S + 30, True)):
        os.utime(lost.path, (time.time() - age,) * 2)
        taken = claims.take("a")
        assert (taken is not None) == free
    assert taken is not None and taken.held and not lost.held
    with lost:  # its process wakes up, sees that it lost, and leaves the other's claim alone
        pass
    assert taken.held and claims.take("a") is None
    with taken:
        pass
    assert list(tmp_path.glob("*.claim")) == []


def test_two_that_find_the_same_dead_claim_cannot_both_take_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path)
    dead = claims.take("a")
    assert dead is not None
    os.utime(dead.path, (time.time() - 2 * STALE_S,) * 2)
    judge, faster = Claims._alive, []

    def slow(own: Claims, path: Path) -> bool:
        alive = judge(own, path)
        monkeypatch.undo()
        faster.append(Claims(tmp_path).take("a"))  # between the other's look and its claim
        return alive

    monkeypatch.setattr(Claims, "_alive", slow)
    assert claims.take("a") is None
    assert faster[0] is not None and faster[0].held


def test_a_claim_is_signed_from_its_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after it was made would block everybody while nobody knows whose it is."""
    link, holders = os.link, []

    def linked(draft: Path, path: Path) -> None:
        link(draft, path)
        holders.append(Claims(tmp_path).holder("a"))

    monkeypatch.setattr(os, "link", linked)
    taken = Claims(tmp_path).take("a")
    assert taken is not None and f"process {os.getpid()}" in holders[0]
    assert list(tmp_path.iterdir()) == [taken.path]


def test_claims_work_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(draft: Path, path: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    taken = Claims(tmp_path).take("a")
    assert taken is not None and taken.held and Claims(tmp_path).take("a") is None
    assert list(tmp_path.iterdir()) == [taken.path]


def test_a_draft_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    machine = claims_module.owner().partition("-")[0]
    (tmp_path / f"a.{machine}-{done.pid}.draft").touch()
    taken = Claims(tmp_path).take("a")
    assert taken is not None and list(tmp_path.iterdir()) == [taken.path]


def test_the_claim_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    code = (  # the one file, as the package around it takes seconds to import
        "import runpy, sys; from pathlib import Path\n"
        "claim = runpy.run_path(sys.argv[1])['Claims'](Path(sys.argv[2])).take('a')\n"
        "with claim: print('taken', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, claims_module.__file__, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout is not None and child.stdout.readline() == "taken\n"
        assert Claims(tmp_path).take("a") is None
        assert f"process {child.pid}" in Claims(tmp_path).holder("a")
        child.send_signal(signal.SIGKILL)
    taken = Claims(tmp_path).take("a")
    assert taken is not None and taken.held
    with taken:
        Claims(tmp_path).tidy()
        assert taken.held
    assert not list(tmp_path.iterdir())


def test_what_the_dead_have_claimed_can_be_given_back(tmp_path: Path) -> None:
    claims, mine = Claims(tmp_path), Claims(tmp_path).take("mine")
    assert mine is not None
    for key in ("a", "b.c"):
        dead = claims.take(key)
        assert dead is not None
        os.utime(dead.path, (time.time() - 2 * STALE_S,) * 2)
    claims.tidy()
    assert list(tmp_path.iterdir()) == [mine.path]


def test_failures_are_left_alone_until_the_next_start(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    before = claims.began
    claims.fail("a", "no such layer")
    assert claims.failure("a") == Claims(tmp_path).failure("a", since_start=False) != ""
    os.utime(tmp_path / "a.failed", (before - 1,) * 2)
    assert claims.failure("a") == "" and claims.failure("a", since_start=False) != ""
