"""Images may be called anything: no name becomes code, an option, a line or a colour of its own."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_space import STAGES, Run, begin

NAMES = (
    "<script>alert(1)<", "<img src=x onerror=alert(2)>", "\"'&amp;&", "'onload='", "two\nlines",
    "--force", "-w", "$(exit 3);`exit 3`", "ünï 画像 🌷", " ", "\x1b[31mred", "\udcff of no text",
)  # fmt: skip


class Page(HTMLParser):
    """A page's text, and its elements and attributes but for their values."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.parts = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts += [tag, *(name for name, _ in attrs)]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def named(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace, not begun, of images that are called so."""
    root = tmp_path_factory.mktemp("named") / "space"
    begin(root, tiny_images)
    for folder in (root / "data").glob("*/*"):
        for path, name in zip(sorted(folder.iterdir()), NAMES, strict=False):
            path.rename(path.with_name(f"{name}.png"))
    return root


def test_file_names_are_data_everywhere(named: Path, run: Run) -> None:
    for command in (*STAGES, "show concepts", "show stitched", "show segments", "verify"):
        told = run(*command.split(), "-w", named)
        assert told.code == 0, (command, told)


def test_a_page_has_the_same_elements_whatever_files_are_called(space: Path, run: Run) -> None:
    """Files that a training left out are named in it."""
    pages, manifest = [], space / "runs/teacher/manifest.json"
    content = json.loads(manifest.read_text())
    for names in ([f"{number}.png" for number in range(3)], NAMES[:3], NAMES[3:6], NAMES[-3:]):
        content["result"]["unreadable"] = names
        manifest.write_text(json.dumps(content))
        assert run("report", "-w", space).code == 0
        pages.append(Page((space / "report.html").read_text(encoding="utf-8")))
        for name in names:
            assert " ".join(name.replace("\udcff", "?").split()) in " ".join(pages[-1].text.split())
    assert {page.parts == pages[0].parts for page in pages} == {True}


def test_an_error_names_files_and_a_terminal_does_not_obey_them(named: Path, run: Run) -> None:
    for path in (named / "data/train/blue").iterdir():
        if not path.stem.isprintable():
            path.write_bytes(b"no image")
    told = run("train", "--force", "-w", named)
    assert told.code == 1 and "cannot read the image blue/two\nlines.png" in told.err
    assert r"blue/\x1b[31mred.png" in told.err and r"blue/\udcff of no text.png" in told.err
    assert all(letter.isprintable() or letter == "\n" for letter in told.err)
