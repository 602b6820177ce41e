"""The pages that teach: every block of them runs, in order, on a tiny set of photographs."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from dop_fast import criteria
from dop_fast.cli.main import dopfast

DOCS = Path(__file__).resolve().parent.parent / "docs"
NEEDS = {"own-model.md": ("timm", "transformers", "onnxscript")}
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.S)


def command(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "python":
        runpy.run_path(arguments[0])
        return
    assert program == "dopfast"
    done = CliRunner().invoke(dopfast, arguments, auto_envvar_prefix="DOPFAST")
    assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("page", ["api.md", "criterion.md", "own-model.md"])
def test_every_block_of_a_page_runs(
    page: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    shutil.copytree(tiny_images, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    # where the page says that a criterion's file goes
    monkeypatch.setattr(
        criteria, "__path__", [*criteria.__path__, str(tmp_path / "dop_fast/criteria")]
    )
    names: dict[str, object] = {}
    for kind, block in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        file = re.match(r"# (\S+\.py)\n", block)
        if kind == "console":
            for line in block.splitlines():
                command(line.removeprefix("$ "))
        elif file:
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(block, encoding="utf-8")
        else:
            exec(compile(block, page, "exec"), names)
