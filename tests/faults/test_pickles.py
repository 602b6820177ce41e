"""No pickle is ever loaded."""

import re
from pathlib import Path

import dop_fast

HOME = Path(dop_fast.__file__).parent.parent
SOURCES = [path for part in ("dop_fast", "cli", "kernels") for path in (HOME / part).rglob("*.py")]


def test_weights_are_the_only_thing_that_torch_loads() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SOURCES]
    calls = [call for text in texts for call in re.findall(r"torch\.load\([^)]*\)", text)]
    assert calls and all("weights_only=True" in call for call in calls)


def test_nothing_else_unpickles_or_runs_what_a_file_says() -> None:
    forbidden = re.compile(
        r"pickle\.(load|Unpickler)|allow_pickle=True|joblib\.load|yaml\.load|\bexec\(|shelve"
        r"|(?<![.\w])eval\(|torch\.package|extractall"
    )
    for path in SOURCES:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path
