import re
import shlex
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
