import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dop_fast import runs
from dop_fast.errors import StoreError
from dop_fast.runs import About

ABOUT = About(
    kind="finetune",
    facts={"mask": "grasp-0.9-s0", "seed": 0},
    settings={"lr": 0.1, "milestones": (0.25, 0.5), "workers": 0},
    sources={"lr": "command line"},
)


def test_a_manifest_says_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    begun = runs.begin(folder, ABOUT)
    assert begun.finished is None and not begun.result
    done = runs.finish(folder, {"top1": 0.75})
    assert done.finished and done.finished >= done.started
    content = json.loads((folder / "manifest.json").read_text())
    assert (content["schema"], content["version"], content["kind"]) == (
        "dopfast.run",
        1,
        "finetune",
    )
    assert content["settings"]["lr"] == {"value": 0.1, "source": "command line"}
    assert content["settings"]["workers"] == {"value": 0, "source": ""}
    assert content["facts"] == dict(ABOUT.facts)
    assert content["result"] == {"top1": 0.75}
    assert set(content["versions"]) == {"dopfast", "torch", "python"}


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    done = runs.finish(tmp_path / "a", {"top1": 0.75})
    listed = {**ABOUT.settings, "milestones": [0.25, 0.5]}
    assert runs.read(tmp_path / "a") == replace(done, about=replace(ABOUT, settings=listed))
    assert done.name == "a"


def test_the_same_run_is_returned_as_it_stands(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    assert runs.begin(tmp_path / "a", ABOUT).finished is None
    runs.finish(tmp_path / "a", {"top1": 0.75})
    assert runs.begin(tmp_path / "a", ABOUT).result == {"top1": 0.75}


def test_how_fast_it_runs_does_not_make_another_run(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    faster = replace(ABOUT, settings={**ABOUT.settings, "workers": 8}, device="cuda")
    assert runs.begin(tmp_path / "a", faster).about.settings["workers"] == 0


@pytest.mark.parametrize(
    "other",
    [
        replace(ABOUT, kind="train"),
        replace(ABOUT, facts={"mask": "snip-0.9-s0", "seed": 0}),
        replace(ABOUT, facts={"seed": 0}),
        replace(ABOUT, settings={**ABOUT.settings, "lr": 0.2}),
    ],
)
def test_another_run_is_refused_unless_forced(tmp_path: Path, other: About) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    runs.write_metrics(tmp_path / "a", [{"epoch": 1}])
    with pytest.raises(StoreError) as caught:
        runs.begin(tmp_path / "a", other)
    assert "--force" in caught.value.hint and "--name" in caught.value.hint
    assert runs.metrics(tmp_path / "a")
    runs.begin(tmp_path / "a", other, force=True)
    assert not runs.metrics(tmp_path / "a")
    assert runs.read(tmp_path / "a").about.kind == other.kind


def test_a_replacement_that_is_interrupted_leaves_a_finished_run_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    (tmp_path / "a" / runs.WEIGHTS).touch()
    runs.finish(tmp_path / "a", {})
    for interrupted in (runs, "write_json"), (Path, "unlink"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*interrupted, interrupt)
            runs.begin(tmp_path / "a", ABOUT, force=True)
        finished = runs.read(tmp_path / "a").finished
        assert not finished or (tmp_path / "a" / runs.WEIGHTS).is_file()
    runs.begin(tmp_path / "a", ABOUT, force=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [runs.MANIFEST]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_refusal_names_what_differs(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    with pytest.raises(StoreError, match=r"lr 0\.1, not 0\.2"):
        runs.begin(tmp_path / "a", replace(ABOUT, settings={**ABOUT.settings, "lr": 0.2}))


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError):
        runs.begin(tmp_path, ABOUT, force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_only_finished_runs_of_ours_are_listed(tmp_path: Path) -> None:
    assert runs.finished_runs(tmp_path / "nothing") == []
    for name in ("b", "a", "unfinished"):
        runs.begin(tmp_path / name, ABOUT)
    runs.finish(tmp_path / "b", {})
    runs.finish(tmp_path / "a", {})
    for name, text in (("broken", "{"), ("list", "[]"), ("other", '{"schema": "x"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    assert [run.name for run in runs.finished_runs(tmp_path)] == ["a", "b"]


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    runs.begin(tmp_path / "a", ABOUT)
    path = tmp_path / "a" / "manifest.json"
    content = json.loads(path.read_text())
    runs.write_json(path, {**content, "version": 2})
    with pytest.raises(StoreError, match="version 1"):
        runs.read(tmp_path / "a")


def test_metrics_are_one_object_an_epoch(tmp_path: Path) -> None:
    assert runs.metrics(tmp_path) == []
    rows = [{"epoch": 1, "top1": 0.5}, {"epoch": 2, "top1": 0.625}]
    runs.write_metrics(tmp_path, rows)
    assert runs.metrics(tmp_path) == rows
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_manifest_names_the_commit_of_the_code(tmp_path: Path) -> None:
    git = ["git", "-C", str(Path(runs.__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    tracked = subprocess.run([*git, "ls-files", "runs.py"], capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("dopfast does not run from a git checkout")
    commit = runs.begin(tmp_path / "a", ABOUT).commit
    assert commit is not None
    assert commit.removesuffix("-dirty") == head.stdout.strip()
