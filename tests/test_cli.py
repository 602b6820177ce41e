import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dop_fast import __version__
from dop_fast.cli.main import COMMANDS, dopfast


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "dop_fast.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def help_of(name: str) -> str:
    result = CliRunner().invoke(dopfast, [name, "--help"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_an_example_and_panels(name: str) -> None:
    text = help_of(name)
    assert f"dopfast {name}" in text.split("Example:")[1].splitlines()[1]
    assert "Output:" in text
    command = dopfast.get_command(click.Context(dopfast), name)
    assert command is not None and len((command.help or "").splitlines()[0]) < 100


def test_the_version_is_printed() -> None:
    assert __version__ in CliRunner().invoke(dopfast, ["--version"]).output


def test_outside_a_workspace_the_way_to_one_is_shown(tmp_path: Path) -> None:
    done = run("stitch", cwd=tmp_path)
    assert done.returncode == 2
    assert "hint: make one: dopfast init" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "dopfast.toml").write_text(
        "[data]\npath = 'nowhere'\n[stitch]\nsigma = 0.5\nper_class = 3\n", encoding="utf-8"
    )
    return tmp_path


@pytest.mark.parametrize("sigma", ["0", "1", "1.5", "-1", "nan"])
def test_sigma_out_of_range_is_a_usage_error(workspace: Path, sigma: str) -> None:
    done = run("stitch", "--sigma", sigma, cwd=workspace)
    assert done.returncode == 2
    assert "sigma must lie in (0, 1)" in done.stderr


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan"])
def test_sparsity_out_of_range_is_a_usage_error(workspace: Path, sparsity: str) -> None:
    done = run("prune", "--sparsity", sparsity, cwd=workspace)
    assert done.returncode == 2
    assert "sparsity must lie in [0, 1)" in done.stderr


def test_a_missing_folder_of_images_is_named(workspace: Path) -> None:
    done = run("extract", cwd=workspace)
    assert done.returncode == 1
    assert "nowhere" in done.stderr and "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_command_names_the_nearest(tmp_path: Path) -> None:
    done = run("prun", cwd=tmp_path)
    assert done.returncode == 2
    assert "prune" in done.stderr


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, tiny_images: Path) -> None:
    assert run("init", "--data", str(tiny_images), cwd=tmp_path).returncode == 0
    done = run("show", "segments", "-o", "nowhere/x.png", cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere/x.png\n" in done.stderr and "Traceback" not in done.stderr
