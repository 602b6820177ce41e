import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import click
import pytest

from dop_fast import criteria, recipes
from dop_fast.cli.main import COMMANDS, dopfast

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINES = [
    (page.name, line.removeprefix("$ "))
    for page in PAGES
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
    if line.removeprefix("$ ").startswith("dopfast ")
]
SCRIPTS = sorted(
    {
        script
        for page in PAGES
        for script in re.findall(r"bench/[a-z]+\.py", page.read_text("utf-8"))
    }
)


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_in_the_documents_exists_with_its_options(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    assert name in COMMANDS
    command = dopfast.get_command(click.Context(dopfast), name)
    assert command is not None
    # with the command's own settings: Click keeps the help option that it makes from the first ones
    context = click.Context(command, resilient_parsing=True, **command.context_settings)
    values, rest, _ = command.make_parser(context).parse_args(arguments)
    assert not rest
    for parameter in command.params:
        if parameter.name in values:
            parameter.type_cast_value(context, values[parameter.name])


@pytest.mark.parametrize(
    "script",
    sorted(
        {
            line
            for page in PAGES
            for line in re.findall(r"bench/[a-z]+\.py", page.read_text(encoding="utf-8"))
        }
    ),
)
def test_every_benchmark_that_a_page_names_says_what_it_does(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.syspath_prepend(ROOT / "bench")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_readme(name: str) -> None:
    assert f"dopfast {name}" in PAGES[0].read_text(encoding="utf-8")


def test_the_readme_names_every_criterion_recipe_and_extra() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].keys() - {"dev"}
    words = {*criteria.names(), *recipes.names(), *extras}
    assert words <= set(re.findall(r"[\w-]+", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_document_links_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
