"""What holds for every command: light before its work, one order of sources, one way to fail."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from small_space import Run, begin

from dop_fast import criteria, recipes
from dop_fast.cli._bar import Bars, Count, Rate, Time
from dop_fast.cli._progress import BARS, progress, track
from dop_fast.cli.main import COMMANDS, dopfast
from dop_fast.config import MATERIALS
from dop_fast.workspace import STAGES

HEAVY = (
    "torch", "torchvision", "zarr", "numba", "sklearn", "matplotlib", "cv2", "scipy", "numpy",
    "PIL", "rich",
)  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
ARGUMENTS = {  # what a command cannot do without
    "init": ["--data", "nowhere"], "sweep": ["table1.toml"], "show": ["concepts"],
    "export": ["onnx"], "import": ["masks.pth"], "demo": ["-o", "file/in/the/way"],
}  # fmt: skip
IN_WORKSPACE = [name for name in COMMANDS if name not in ("init", "demo", "doctor")]
WITHOUT_WORK = [
    ["--help"], ["--version"], ["prun"], ["stitch", "--sigma", "x"], ["show", "tulips"],
    *([name, *rest] for name in COMMANDS for rest in (["--help"], ["--no-such-option"])),
]  # fmt: skip


def completion(shell: str, words: str) -> dict[str, str]:
    """Return the environment in which `shell` asks how `words` may go on."""
    parts = words.split(" ")
    word = parts[-1] if shell == "fish" else str(len(parts) - 1)
    asked = {"COMP_WORDS": words, "COMP_CWORD": word}
    return {"_DOPFAST_COMPLETE": f"{shell}_complete", **asked}


def completed(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: str, shell: str = "bash"
) -> list[str]:
    for name, value in completion(shell, words).items():
        monkeypatch.setenv(name, value)
    lines = run().out.splitlines()
    if shell == "zsh":  # three lines each: kind, word, help
        return lines[1::3]
    return [line.split(",")[1].split("\t")[0] for line in lines]


def test_nothing_heavy_is_loaded_before_there_is_work() -> None:
    words = [
        "dopfast ",
        "dopfast prune --",
        "dopfast prune --criterion ",
        "dopfast train --recipe ",
    ]
    asked = [completion(shell, text) for shell in SHELLS for text in words]
    sources = [{"_DOPFAST_COMPLETE": f"{shell}_source"} for shell in SHELLS]
    code = (
        "import os, sys\n"
        "from dop_fast.cli.main import main\n"
        "def call(arguments, environment):\n"
        "    sys.argv = ['dopfast', *arguments]\n"
        "    os.environ.update(environment)\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not loaded, (arguments, environment, loaded)\n"
        f"for arguments in {WITHOUT_WORK!r}: call(arguments, {{}})\n"
        f"for environment in {asked + sources!r}: call([], environment)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_options_and_their_values(
    run: Run, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    def after(words: str) -> list[str]:
        return completed(run, monkeypatch, words, shell)

    assert after("dopfast ") == list(COMMANDS)
    settings = {f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(STAGES["prune"])}
    assert settings | {"--workspace", "--json", "--dry-run"} < set(after("dopfast prune --"))
    assert after("dopfast prune --criterion ") == list(criteria.names())
    assert after("dopfast prune --material ") == ["auto", *MATERIALS]
    assert after("dopfast finetune --recipe ") == list(recipes.names())
    assert after("dopfast prune -w nowhere --criterion gra") == ["grasp"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_that_the_readme_has_a_shell_read_asks_dopfast(
    run: Run, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    monkeypatch.setenv("_DOPFAST_COMPLETE", f"{shell}_source")
    told = run()
    assert told.code == 0 and f"_DOPFAST_COMPLETE={shell}_complete" in told.out
    if shell == "bash":
        asked = f"{told.out}\ncomplete -p dopfast"
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
        assert done.stdout.endswith("dopfast\n") and not done.stderr


def shown(run: Run, name: str, space: Path, *arguments: str) -> dict[str, dict[str, object]]:
    told = run(name, *ARGUMENTS.get(name, []), "-w", space, "--dry-run", "--json", *arguments)
    found: dict[str, dict[str, object]] = json.loads(told.out)["values"]
    return found


@pytest.mark.parametrize(
    ("name", "key", "default", "values"),
    [
        ("extract", "images", 50, (11, 12, 13)),
        ("extract", "n_segments", [], ([4, 5], [6], [7, 8, 9])),
        ("stitch", "sigma", 0.75, (0.5, 0.6, 0.7)),
        ("prune", "sparsity", 0.9, (0.5, 0.6, 0.7)),
        ("prune", "criterion", "grasp", ("snip", "force", "synflow")),
        ("train", "nesterov", False, (True, False, True)),
        ("finetune", "epochs", 120, (1, 2, 3)),
        ("sanity", "material", ["available"], (["patches"], ["images"], ["images", "patches"])),
    ],
)
def test_flag_beats_environment_beats_file_beats_default(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, key: str, default: object, values: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    toml, option = tmp_path / "dopfast.toml", f"--{key.replace('_', '-')}"
    toml.write_text("", encoding="utf-8")
    in_file, in_environment, as_flag = values
    text = [",".join(map(str, v)) if isinstance(v, list) else str(v) for v in values]
    assert shown(run, name, tmp_path)[key] == {"value": default, "source": "default"}
    toml.write_text(f"[{name}]\n{key} = {json.dumps(in_file)}", encoding="utf-8")
    assert shown(run, name, tmp_path)[key] == {"value": in_file, "source": "dopfast.toml"}
    monkeypatch.setenv(f"DOPFAST_{name}_{key}".upper(), text[1])
    assert shown(run, name, tmp_path)[key] == {"value": in_environment, "source": "environment"}
    flag = [option] if as_flag is True else [option, text[2]]
    assert shown(run, name, tmp_path, *flag)[key] == {"value": as_flag, "source": "flag"}


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_a_recipe_comes_between_the_file_and_the_default(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "dopfast.toml").write_text(f"[{name}]\nlr = 0.3", encoding="utf-8")
    found = shown(run, name, tmp_path, "--recipe", "cifar", "--batch-size", "7")
    monkeypatch.setenv(f"DOPFAST_{name}_RECIPE".upper(), "cifar")
    again = shown(run, name, tmp_path, "--batch-size", "7")
    assert {key: value for key, value in again.items() if key != "recipe"} == {
        key: value for key, value in found.items() if key != "recipe"
    }
    assert found["lr"] == {"value": 0.3, "source": "dopfast.toml"}
    assert found["batch_size"] == {"value": 7, "source": "flag"}
    said = recipes.read("cifar")
    assert found["milestones"] == {"value": said["milestones"], "source": "recipe cifar"}
    assert found["keep_every"]["source"] == "default"


@pytest.mark.parametrize(
    "name",  # sweep shows cells; on the others no number has an effect
    [name for name in IN_WORKSPACE if name not in ("sweep", "report", "show", "export", "verify")],
)
def test_the_seed_is_the_workspace_s_unless_another_is_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "dopfast.toml").write_text("seed = 3", encoding="utf-8")
    assert shown(run, name, tmp_path)["seed"] == {"value": 3, "source": "dopfast.toml"}
    monkeypatch.setenv(f"DOPFAST_{name}_SEED".upper(), "4")
    assert shown(run, name, tmp_path)["seed"] == {"value": 4, "source": "environment"}
    assert shown(run, name, tmp_path, "--seed", "5")["seed"] == {"value": 5, "source": "flag"}


def failed(run: Run, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    told = run(*arguments, "--json")
    (line,) = told.out.splitlines()
    content = json.loads(line)
    assert list(content) == ["error"] and list(content["error"]) == ["kind", "message", "hint"]
    assert all(content["error"].values()) and "Traceback" not in told.err
    return told.code, content["error"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_is_one_json_object_where_json_is_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = failed(run, name, "--no-such-option")
    assert code == 2 and error["kind"] == "usage"
    if name not in IN_WORKSPACE:
        return
    needed = ARGUMENTS.get(name, [])
    code, error = failed(run, name, *needed)
    assert code == 2 and "dopfast init" in error["hint"]
    (tmp_path / "dopfast.toml").write_text("[prune]\nsparcity = 0.5", encoding="utf-8")
    code, error = failed(run, name, *needed)
    assert code == 2 and "sparcity" in error["message"] and "sparsity" in error["hint"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_is_a_json_object_where_the_environment_asks_for_json(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, as_json in (("1", True), ("true", True), ("0", False), ("", False)):
        monkeypatch.setenv(f"DOPFAST_{name}_JSON".upper(), given)
        told = run(name, "--no-such-option")
        assert told.code == 2 and (not told.err if as_json else not told.out)
        if as_json:
            assert json.loads(told.out)["error"]["kind"] == "usage"
    monkeypatch.setenv(f"DOPFAST_{name}_JSON".upper(), "1")
    if name in IN_WORKSPACE:
        told = run(name, *ARGUMENTS.get(name, []))
        assert "dopfast init" in json.loads(told.out)["error"]["hint"]


@pytest.mark.parametrize("name", ["init", "demo"])
def test_a_command_that_makes_a_workspace_fails_in_json_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, _ = failed(run, name, *ARGUMENTS[name])
    assert code == 1 and list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("name", IN_WORKSPACE)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_a_workspace_that_cannot_be_opened_does_not_hide_the_help(
    run: Run, tmp_path: Path, name: str, option: str
) -> None:
    told = run(name, "-w", tmp_path / "nowhere", option)
    assert told.code == 0 and "Example:" in told.out and not told.err


def test_colours_are_left_out_where_no_color_is_set(tmp_path: Path, tiny_images: Path) -> None:
    arguments = ["init", "-w", str(tmp_path), "--data", str(tiny_images), "--force"]
    told = [
        CliRunner(env=env).invoke(dopfast, arguments, color=True).stderr
        for env in ({"NO_COLOR": None}, {"NO_COLOR": "1"})
    ]
    assert "\x1b[" in told[0] and "next  dopfast train" in told[1] and "\x1b[" not in told[1]


def test_a_quiet_command_prints_its_result_alone(
    run: Run, tmp_path: Path, tiny_images: Path
) -> None:
    arguments = ("init", "-w", tmp_path, "--data", tiny_images, "--force")
    loud, quiet = run(*arguments), run(*arguments, "-q")
    assert quiet.out == loud.out and "3 classes: blue, green, red" in quiet.out
    assert "wrote" in loud.err and "wrote" not in quiet.err and "next" not in quiet.err


def test_a_verbose_command_logs_each_step_with_its_time(
    run: Run, tmp_path: Path, tiny_images: Path
) -> None:
    begin(tmp_path, tiny_images)
    assert run("train", "-w", tmp_path, "-q").code == 0
    told = run("extract", "-w", tmp_path, "-v", "--device", "cpu")
    logged = re.findall(r"^ *[\d.]+ s  (.*)$", told.err, re.MULTILINE)
    steps = [
        f"{work} {name}"
        for work in ("random segments:", "extracting")
        for name in ("blue", "green", "red")
    ]
    assert logged == ["device cpu, threads 1", *steps, "done"]
    again = run("extract", "-w", tmp_path)
    assert again.out == told.out and " s  " not in again.err
    assert not run("extract", "-w", tmp_path, "-v", "-q").err.count(" s  ")
    rows = json.loads(run("extract", "-w", tmp_path, "--json").out)["classes"]
    assert all(isinstance(row[key], float) for row in rows for key in ("tcav", "p"))


def test_commands_that_come_next_are_for_the_workspace_that_was_named(
    run: Run, tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = tmp_path / "my space"
    made = run("init", "-w", space, "--data", tiny_images)
    assert f"next  dopfast train -w '{space}'\n" in made.err
    failed = run("stitch", "--workspace", space)
    assert f"hint: run: dopfast extract -w '{space}'\n" in failed.err
    assert f"dopfast init -w {tmp_path} --data DIR" in run("stitch", "-w", tmp_path).err
    assert "hint: dopfast stitch --help\n" in run("stitch", "-w", space, "--sigme", "1").err
    monkeypatch.setenv("DOPFAST_WORKSPACE", str(space))  # which holds for the next command too
    assert "hint: run: dopfast extract\n" in run("stitch").err


def test_values_are_shown_as_they_would_be_given(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dopfast.toml").touch()
    told = run("sanity", "-w", tmp_path, "--dry-run")
    shown = {words[0]: words[1:] for words in map(str.split, told.out.splitlines())}
    assert shown["material"] == ["available", "default"]
    assert shown["criterion"] == ["snip,grasp", "default"]
    assert shown["finetune"] == ["false", "default"]
    told = run("export", "csr", "-w", tmp_path, "--dry-run")
    assert ["output", "default"] in map(str.split, told.out.splitlines())


def test_no_command_shows_the_help_and_no_error(run: Run) -> None:
    told = run()
    assert told.code == 2 and told.err.startswith("Usage: dopfast") and "error" not in told.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["show"], "Choose from: concepts, stitched, segments", "dopfast show --help"),
        (["export", "onxx"], "there is no 'onxx'; did you mean 'onnx'?", "dopfast export --help"),
        (["stitch", "--sigma"], "'--sigma' requires an argument", "dopfast stitch --help"),
        (["export", "dense", "--run", "nope"], "there is no run nope", "dopfast finetune"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_what_is_right_in_the_next(
    run: Run, tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str, hint: str,
) -> None:  # fmt: skip
    begin(tmp_path, tiny_images)
    monkeypatch.chdir(tmp_path)
    told = run(*arguments)
    first, *_, last = told.err.splitlines()
    assert message in first and last.startswith("hint: ") and last.endswith(hint)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("quiet", "stream", "drawn"),
    [(False, Terminal, True), (True, Terminal, False), (False, io.StringIO, False)],
)
def test_bars_are_drawn_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, quiet: bool, stream: type[io.StringIO], drawn: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stderr", stream())
    ctx = click.Context(click.Command("any"), info_name="waits")
    with ctx.scope(), progress(ctx, quiet=quiet, verbose=False):
        for outer in track([1, 2], lambda number: f"class {number}", 2):
            for inner in track(iter("abc"), f"epoch {outer}", 3):
                if drawn and inner == "c":  # else it is drawn ten times a second
                    ctx.meta[BARS].refresh()
    said = click.unstyle(sys.stderr.getvalue())  # type: ignore[attr-defined]
    for text in ("waits", "class 2", "epoch 2", "2/3"):
        assert text in said if drawn else said == ""


@pytest.mark.parametrize(
    ("took_s", "now_s", "rate", "left"),
    [
        ((), 9, "", ""),  # of nothing done nothing is known
        ((8,), 0, "8.0 s each", "0:00:32 left"),
        ((8, 0.01, 0.01), 0, "100.0/s", "0:00:01 left"),  # the first one had to warm up
        ((8, 2, 2), 1, "2.0 s each", "0:00:03 left"),  # it goes on while one is worked on
        ((8, 2, 2), 26, "10.0 s each", "0:00:10 left"),  # and longer where that takes longer
    ],
)
def test_a_bar_tells_how_fast_it_goes_and_how_long_it_will(
    took_s: tuple[float, ...], now_s: float, rate: str, left: str
) -> None:
    bars, now = Bars("extract"), [0.0]
    bars.get_time = lambda: now[0]
    items = bars.over(range(5), "extracting", 5)
    next(items)
    for took in took_s:
        now[0] += took
        next(items)
    now[0] += now_s
    task = bars.tasks[-1]
    assert (str(Rate().render(task)), str(Time().render(task))) == (rate, left)


def test_a_bar_of_unknown_length_counts_and_tells_the_time_it_has_taken() -> None:
    bars, now = Bars("verify"), [0.0]
    bars.get_time = lambda: now[0]
    items = bars.over(iter("abc"), "reading", None)
    assert list(zip("ab", items, strict=False)) == [("a", "a"), ("b", "b")]
    now[0] = 61.5
    task = bars.tasks[-1]
    assert (str(Count().render(task)), str(Time().render(task))) == ("1", "0:01:01")
