"""Following a training on the terminal: interrupted, quiet, and what it left out."""

import json
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from dop_fast import runs
from dop_fast.cli.main import dopfast

DOPFAST = [sys.executable, "-m", "dop_fast.cli"]


@pytest.fixture
def space(tmp_path: Path, tiny_images: Path) -> Path:
    made = CliRunner().invoke(
        dopfast, ["init", "-w", str(tmp_path), "--data", str(tiny_images), "--size", "32"]
    )
    assert made.exit_code == 0, made.output
    return tmp_path


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(space: Path) -> None:
    command = [*DOPFAST, "train", "-w", str(space), "--epochs", "500", "--device", "cpu"]
    # in a job behind the prompt interruptions are ignored, and by its children too
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("  epoch   2"):
                process.send_signal(signal.SIGINT)
                break
        said = process.stderr.read()
    assert process.returncode == 130
    kept = len(runs.metrics(space / "runs" / "teacher"))
    # it may come between the checkpoint and the line of an epoch
    told = [f"what is finished is kept: {count} of 500 epochs" for count in (kept, kept - 1)]
    assert any(text in said for text in told), said
    assert "hint: run the same command again to go on" in said
    assert "Traceback" not in said


def test_a_piped_training_prints_a_line_an_epoch_and_a_quiet_one_none(space: Path) -> None:
    command = ["train", "-w", str(space), "--epochs", "2", "--recipe", "cifar", "--json"]
    loud = CliRunner().invoke(dopfast, command)
    first, last = loud.stderr.splitlines()
    assert re.match(r"  epoch   1 .* \d:\d\d:\d\d left$", first)
    assert re.match(r"  epoch   2 .* images/s$", last)
    quiet = CliRunner().invoke(dopfast, [*command, "--quiet"])
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["top1"] == json.loads(loud.stdout)["top1"]
    told = runs.read(space / "runs" / "teacher").about.sources
    assert (told["epochs"], told["milestones"]) == ("flag", "recipe cifar")


def test_unreadable_images_are_named_in_the_manifest_and_told(space: Path) -> None:
    data = space / "data"
    for part, count in (("train", 60), ("val", 10)):
        for name in ("dark", "light"):
            (data / part / name).mkdir(parents=True)
            for index in range(count):
                shade = (40 if name == "dark" else 200) + index % 10
                _write(data / part / name / f"{index:02}.png", shade)
    (data / "train" / "dark" / "17.png").write_bytes(b"\x89PNG, cut off")
    toml = space / "dopfast.toml"
    text = toml.read_text(encoding="utf-8").splitlines()
    text = [f"path = {json.dumps(str(data))}" if t.startswith("path = ") else t for t in text]
    toml.write_text("\n".join(text), encoding="utf-8")
    done = CliRunner().invoke(dopfast, ["train", "-w", str(space), "--epochs", "1"])
    assert done.exit_code == 0, done.output
    assert "were left out, 1 in all: dark/17.png" in done.stderr
    assert runs.read(space / "runs" / "teacher").result["unreadable"] == ["dark/17.png"]


def _write(path: Path, shade: int) -> None:

    Image.new("RGB", (32, 32), (shade, shade, shade)).save(path)
