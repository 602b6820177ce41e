"""Running a sweep: what is done is skipped, by one process or several; nothing is done twice."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dop_fast import masks, pipeline, runs, sweep, workspace
from dop_fast.claims import STALE_S, Claim, Claims
from dop_fast.cli.main import dopfast
from dop_fast.config import ExtractConfig
from dop_fast.errors import ModelError, StoreError
from dop_fast.sweep import running
from dop_fast.sweep.definition import parse
from dop_fast.workspace import Workspace

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "criteria": ["snip"],
    "materials": ["images", "ones"],
    "sparsities": [0.9],
    "seeds": 2,
    "controls": ["random"],
    "prune": {"per_class": 2},
    "finetune": {"epochs": 1, "batch_size": 36, "augment": "none"},
}
TOML = """
criteria = ["snip"]
materials = ["images", "ones"]
sparsities = [0.9]
seeds = 2
controls = ["random"]
prune = {per_class = 2}
finetune = {epochs = 1, batch_size = 36, augment = "none"}
"""
CELLS = 8  # (2 materials + random) x 2 seeds + 2 dense


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Workspace:
    made, _, _ = pipeline.init(
        tmp_path / "space", data=str(tiny_images), size=16, teacher="resnet20", model="", seed=0,
        force=False,
    )  # fmt: skip
    (made.root / "small.toml").write_text(TOML, encoding="utf-8")
    return made


def book(space: Workspace, **changed: Any) -> sweep.Book:
    """Open a sweep as another process would."""
    return sweep.Book(parse({**SMALL, **changed}, "small"), space)


def drain(steps: running.Steps) -> tuple[str, ...]:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: tuple[str, ...] = end.value
            return result


def states(of: sweep.Book) -> list[str]:
    return [of.state(cell) for cell in of.cells]


def start(space: Workspace, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "dop_fast.cli", "sweep", *arguments]
    return subprocess.Popen(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=space.root, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# sweeps


def test_a_sweep_does_every_cell_once_and_then_nothing(space: Workspace) -> None:
    first = book(space)
    assert set(states(first)) == {"free"} and not (space.root / "sweeps").exists()
    done = drain(sweep.run(first, CPU))
    assert sorted(done) == sorted(cell.run for cell in first.cells) and len(done) == CELLS
    finished = {run.name: run for run in runs.finished_runs(space.runs)}
    assert finished.keys() == set(done)
    for cell in first.cells:
        facts = finished[cell.run].about.facts
        assert (facts["seed"], facts["sparsity"]) == (cell.seed, cell.sparsity)
        assert facts["criterion"] == (cell.row.criterion if cell.row else None)
        assert facts["material"] == (cell.row.material or "none" if cell.row else None)
    assert drain(sweep.run(book(space), CPU)) == ()
    results, wrote = sweep.write(first)
    assert results.done == CELLS and {path.name for path in wrote} == {
        "table.md", "table.csv", "table.json", "accuracy.svg", "accuracy.png"
    }  # fmt: skip
    assert not [path for path in space.root.rglob("*") if path.suffix in (".partial", ".claim")]


def test_an_interrupted_sweep_goes_on_in_the_middle_of_a_cell(space: Workspace) -> None:
    longer = {"finetune": {**SMALL["finetune"], "epochs": 3}, "seeds": 1}
    steps = sweep.run(book(space, **longer), CPU)
    seen = 0
    for step in steps:
        seen += not isinstance(step, str)
        if seen == 3 + 2:  # dense is done, the second cell has two epochs of three
            break
    steps.close()
    assert states(book(space, **longer))[:3] == ["done", "begun", "free"]
    again = book(space, **longer)
    kept = (space.runs / again.cells[1].run / runs.METRICS).read_text(encoding="utf-8")
    done = drain(sweep.run(again, CPU))
    assert again.cells[0].run not in done and len(done) == len(again.cells) - 1
    now = (space.runs / again.cells[1].run / runs.METRICS).read_text(encoding="utf-8")
    assert now.startswith(kept) and len(now.splitlines()) == 3  # times and all: not trained again


GATE = """
import sys
from dop_fast import sweep
from dop_fast.cli.main import main
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
sys.argv = ["dopfast", "sweep", "small.toml", "--json"]
main()
"""


def test_two_processes_share_the_cells_and_none_is_done_twice(space: Workspace) -> None:
    pair = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", GATE], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=space.root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in pair:  # both have imported everything before either begins
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
    for process in pair:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=200) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ended
    shares = [json.loads(out)["done_here"] for out, _ in ended]
    every = [name for share in shares for name in share]
    assert sorted(every) == sorted(cell.run for cell in book(space).cells)  # and so none twice
    assert all(shares), "one process did everything"
    assert set(states(book(space))) == {"done"}


def test_what_a_killed_process_began_is_finished_by_the_next(space: Workspace) -> None:
    slow = TOML.replace("epochs = 1", "epochs = 400").replace("seeds = 2", "seeds = [0]")
    (space.root / "slow.toml").write_text(slow, encoding="utf-8")
    with start(space, "slow.toml") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch   2" in line:
                break
        own = sweep.Book(sweep.load(space.root / "slow.toml"), space)
        assert own.state(own.cells[0]).endswith(f"{platform.node()}, process {process.pid}")
        steps = sweep.run(own, CPU)
        assert own.cells[1].run in str(next(steps))  # the first one is taken
        steps.close()
        process.kill()
    assert own.state(own.cells[0]) == "begun"
    steps = sweep.run(own, CPU)
    assert own.cells[0].run in str(next(steps))
    epochs = [next(steps) for _ in range(2)]
    assert [getattr(epoch, "epoch", None) for epoch in epochs] == [1, 2]
    steps.close()


def test_a_process_that_lost_its_claim_leaves_the_cell_to_the_other(space: Workspace) -> None:
    own = book(space, finetune={**SMALL["finetune"], "epochs": 3}, seeds=1)
    steps = sweep.run(own, CPU)
    assert own.cells[0].run in str(next(steps))
    (claim,) = own.claims.folder.glob("*.claim")
    os.utime(claim, (time.time() - 2 * STALE_S,) * 2)
    taken = Claims(own.claims.folder).take(own.cells[0].key)
    assert taken is not None
    assert "taken over" in str(next(steps))
    assert own.cells[1].run in str(next(steps))
    steps.close()
    assert own.run(own.cells[0]) is None and taken.held


def test_nothing_is_removed_where_another_process_does_one_of_the_cells(space: Workspace) -> None:
    own = book(space, seeds=1, materials=["ones"])
    drain(sweep.run(own, CPU))
    with taken(Claims(own.claims.folder), own.cells[-1].key):
        with pytest.raises(StoreError, match=f"{own.cells[-1].run} is being done by"):
            drain(sweep.run(own, CPU, force=True))
        assert all(map(own.run, own.cells))
    assert not list(own.claims.folder.glob("*.claim"))


def taken(claims: Claims, key: str) -> Claim:
    claim = claims.take(key)
    assert claim is not None
    return claim


def test_a_cell_that_fails_stops_no_other_and_is_told(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline.prune

    def failing(*arguments: Any, name: str, **others: Any) -> Any:
        if name.startswith("snip-ones"):
            raise ModelError("a score is NaN", "score on other material")
        return plain(*arguments, name=name, **others)

    monkeypatch.setattr(pipeline, "prune", failing)
    own = book(space)
    assert len(drain(sweep.run(own, CPU))) == CELLS - 2
    failed = [state for state in states(own) if state != "done"]
    assert failed == ["failed: a score is NaN; score on other material"] * 2
    result = CliRunner().invoke(dopfast, ["sweep", "-w", str(space.root),
                                          str(space.root / "small.toml")])  # fmt: skip
    assert "2 of 8 cells failed" in str(result.exception)
    monkeypatch.undo()
    assert len(drain(sweep.run(book(space), CPU))) == 2  # the next start tries again


def test_runs_of_other_images_are_not_mixed_in_unless_made_anew(
    space: Workspace, tiny_copy: Path
) -> None:
    own = book(space, seeds=1, materials=["ones"])
    drain(sweep.run(own, CPU))
    next((tiny_copy / "train" / "red").iterdir()).unlink()
    toml = space.root / workspace.TOML
    text = toml.read_text(encoding="utf-8").replace(space.data.path, str(tiny_copy))
    toml.write_text(text, encoding="utf-8")
    changed = book(workspace.load(space.root), seeds=1, materials=["ones"])
    with pytest.raises(StoreError, match="differ in the images"):
        drain(sweep.run(changed, CPU))
    assert len(drain(sweep.run(changed, CPU, force=True))) == len(own.cells)


def test_stitched_patches_of_two_thresholds_are_made_beside_the_store_and_kept_apart(
    space: Workspace,
) -> None:
    drain_training(space)
    extract = ExtractConfig(images=8, tcav_images=4, n_segments=(4,), clusters=2, min_members=2,
                            max_members=4, random_sets=4)  # fmt: skip
    pipeline.extract(space, extract, 0, CPU)
    grids = [
        {"criteria": ["snip"], "materials": ["stitched"], "sparsities": [0.9],
         "stitch": {"sigma": sigma, "per_class": 2}}
        for sigma in (0.3, 0.6)
    ]  # fmt: skip
    asked = {"grid": grids, "seeds": 1, "dense": False, "criteria": [], "controls": [],
             "materials": []}  # fmt: skip
    own = book(space, **asked)
    assert len(drain(sweep.run(own, CPU))) == 2
    stitchings = [own.store(cell.row).stitching for cell in own.cells]
    assert [made and made["sigma"] for made in stitchings] == [0.3, 0.6]
    assert sweep.Book(own.sweep, space).outdated() == {}
    assert not (Path(space.patches) / "stitched").exists()
    assert drain(sweep.run(book(space, **asked), CPU)) == ()
    header = Path(space.patches) / "zarr.json"  # as if it had been extracted with another fill
    text = header.read_text(encoding="utf-8")
    header.write_text(re.sub(r'("fill": )117', r"\g<1>118", text), encoding="utf-8")
    with pytest.raises(StoreError, match="differ in the store of patches"):
        drain(sweep.run(book(space, **asked), CPU))


def test_controls_take_the_densities_of_the_masks_they_are_like_which_are_made_first(
    space: Workspace,
) -> None:
    own = book(space, seeds=1, dense=False, controls=["same-densities"])
    controls = [cell for cell in own.cells if cell.like]
    alone = sweep.Book(own.sweep, space)
    alone.__dict__["cells"] = tuple(sorted(own.cells, key=lambda cell: not cell.like))
    assert [alone.lacks(cell) for cell in controls] == [cell.like for cell in controls]
    assert len(drain(sweep.run(alone, CPU))) == len(own.cells) == 4
    for cell in controls:
        there, like = (masks.load(own.mask(other)) for other in (cell, own.origin(cell)))
        assert [row.kept for row in there.layers()] == [row.kept for row in like.layers()]
        assert not all(torch.equal(kept, like.masks[name]) for name, kept in there.masks.items())
    assert own.outdated() == {} and drain(sweep.run(own, CPU)) == ()


def drain_training(space: Workspace) -> None:
    config = parse(SMALL, "small").finetune
    for _ in pipeline.train(space, config, 0, CPU):
        pass


# the command


def test_dry_run_shows_every_cell_with_its_state_and_computes_nothing(space: Workspace) -> None:
    result = CliRunner().invoke(
        dopfast, ["sweep", "-w", str(space.root), str(space.root / "small.toml"), "--dry-run",
                  "--json"],
    )  # fmt: skip
    shown = json.loads(result.output)
    assert [cell["state"] for cell in shown["cells"]] == ["free"] * CELLS and shown["done"] == 0
    assert not space.runs.exists() and not space.masks.exists()


def test_a_typo_ends_with_exit_code_2_and_the_right_word(space: Workspace) -> None:
    path = space.root / "small.toml"
    path.write_text(TOML.replace("materials", "materails"), encoding="utf-8")
    with start(space, "small.toml") as process:
        out, _ = process.communicate(timeout=100)
    error = json.loads(out)["error"]
    assert process.returncode == 2 and "'materials'" in error["hint"]
    assert not space.runs.exists()


def test_another_network_has_runs_and_tables_of_its_own(space: Workspace) -> None:
    def shown(*arguments: str) -> set[str]:
        result = CliRunner().invoke(
            dopfast, ["sweep", "-w", str(space.root), str(space.root / "small.toml"), "--dry-run",
                      "--json", *arguments],
        )  # fmt: skip
        return {cell["run"] for cell in json.loads(result.output)["cells"]}

    assert not shown() & shown("--model", "resnet32")
