"""Every stage that takes long shows what it is working on, of how many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from small_space import Run, begin

from dop_fast.cli import _click
from dop_fast.cli._progress import BARS

CLASSES = ("blue", "green", "red")


class Seen:
    """Bars that keep what they would show."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int | None]] = []

    def over(
        self, items: Iterable[Any], label: str | Callable[[Any], str], total: int | None
    ) -> Iterator[Any]:
        for item in items:
            self.steps.append((label if isinstance(label, str) else label(item), total))
            yield item


@pytest.fixture
def shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, int | None]]]:
    """Return a caller of `dopfast` that returns each step that its bars showed, and of how many."""

    def called(*arguments: str | Path) -> list[tuple[str, int | None]]:
        seen = Seen()

        @contextmanager
        def progress(ctx: click.Context, **how: bool) -> Iterator[None]:
            ctx.meta[BARS] = seen
            yield

        monkeypatch.setattr(_click, "progress", progress)
        told = run(*arguments)
        assert told.code == 0, told.err
        return seen.steps

    return called


def test_each_stage_shows_what_it_is_working_on(
    shown: Callable[..., list[tuple[str, int | None]]], tmp_path: Path, tiny_images: Path
) -> None:
    begin(tmp_path, tiny_images)
    space = ("-w", tmp_path)
    assert shown("train", *space) == [
        ("reading images", 1), *[("epoch 1/1", 3)] * 3, ("reading images", 1),
        *[("epoch 1/1, validation", 2)] * 2,
    ]  # fmt: skip
    assert shown("extract", *space) == [
        (f"{work} {name}", 3) for work in ("random segments:", "extracting") for name in CLASSES
    ]
    assert shown("stitch", *space) == [(f"stitching {name}", 3) for name in CLASSES]
    assert shown("prune", *space, "--batch-size", "2") == [("snip-stitched-0.9-s0", 3)] * 3
    assert shown("prune", *space, "--batch-size", "2") == []  # it is there
    assert shown("verify", *space)[:2] == [
        ("read patches.zarr", None),
        ("read patches.zarr/classes/0", None),
    ]
    finetuned = [label for label, _ in shown("finetune", *space)]
    assert finetuned.count("epoch 1/1") == 3
    assert shown("report", *space) == [
        *((f"drawing {name}", 3) for name in CLASSES), *[("drawing stitched patches", 3)] * 3,
    ]  # fmt: skip
