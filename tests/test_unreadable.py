"""Images that cannot be read, in a training."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from array_images import noisy
from PIL import Image
from tiny_training import CONFIG, CPU, DATA, fit, network

from dop_fast import runs, training
from dop_fast.errors import DataError
from dop_fast.images import ImageSet
from dop_fast.report import facts, table
from dop_fast.sources import Source
from dop_fast.training import TrainData, loader
from dop_fast.workspace import ModelConfig, TeacherConfig, Workspace

CONFIG = replace(CONFIG, epochs=2)


@dataclass(frozen=True)
class Damaged:
    """A source some of whose images cannot be read."""

    whole: Source
    bad: frozenset[int]

    def open(self, index: int) -> Image.Image:
        if index in self.bad:
            raise OSError("truncated")
        return self.whole.open(index)


def damaged(images: ImageSet, *bad: int) -> ImageSet:
    return replace(images, source=Damaged(images.source, frozenset(bad)))


TRAIN, VAL = noisy(120, 0), noisy(100, 1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and torch's loader
@pytest.mark.parametrize("hold_bytes", [0, 2**30])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["pad", "resized", "none"])
def test_an_unreadable_image_is_left_out_and_the_others_are_as_ever(
    monkeypatch: pytest.MonkeyPatch, kind: str, workers: int, hold_bytes: int
) -> None:
    monkeypatch.setattr(loader, "HOLD_BYTES", hold_bytes)
    chunks = loader.training_order(120, 8, 0, 1)
    (at,) = (number for number, chunk in enumerate(chunks) if 7 in chunk)
    good = loader.Pixels(TRAIN, workers, CPU)
    bad = loader.Pixels(damaged(TRAIN, 7), workers, CPU)
    pairs = [
        list(loader.training_batches(pixels, chunks, kind, 0, 1, erasing=0.5))
        for pixels in (good, bad)
    ]
    for number, ((pixels, labels), (fewer, theirs)) in enumerate(zip(*pairs, strict=True)):
        stay = torch.from_numpy(chunks[number] != 7)
        assert len(fewer) == 8 - (number == at)
        assert torch.equal(fewer, pixels[stay]) and torch.equal(theirs, labels[stay])
    assert [str(error) for error in bad.unreadable.values()] == [
        "cannot read the image 7: truncated"
    ]


def test_accuracy_is_that_of_the_images_that_can_be_read() -> None:
    keep = [i for i in range(100) if i != 3]
    part = replace(VAL, labels=VAL.labels[keep], names=tuple(map(str, keep)))
    part = replace(part, source=replace(VAL.source, pixels=VAL.source.pixels[keep]))  # type: ignore[attr-defined, type-var]
    one, other = (training.evaluate(network(), s, DATA, CPU) for s in (damaged(VAL, 3), part))
    assert (one.top1, one.loss) == (pytest.approx(other.top1), pytest.approx(other.loss))


def test_a_training_names_what_it_left_out_before_an_interruption_too(tmp_path: Path) -> None:
    data = TrainData(damaged(TRAIN, 7), damaged(VAL, 3), DATA)
    epochs = fit(tmp_path, network(), CONFIG, data=data)
    next(epochs)
    epochs.close()
    mended = fit(tmp_path, network(), CONFIG, data=TrainData(TRAIN, VAL, DATA))
    with pytest.raises(StopIteration) as ended:
        while True:
            next(mended)
    assert ended.value.value.unreadable == ("7", "3")


def test_the_report_names_what_was_left_out(tmp_path: Path) -> None:
    space = Workspace(tmp_path, 0, DATA, TeacherConfig(), ModelConfig(), {})
    results = []
    for name, unread in (("a", ["7.png"]), ("b", ["7.png", "3.png"])):
        asked = runs.About("finetune", {"seed": 0}, {})
        runs.begin(tmp_path / name, asked)
        done = {"top1": 0.5, "top5": 1.0, "unreadable": unread}
        results.append(table.result(runs.finish(tmp_path / name, done), name))
    told = facts.overview(space, None, None, results)["Left out"]
    assert told == "2 images that cannot be read: 3.png, 7.png"
    assert "Left out" not in facts.overview(space, None, None, [])


@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_more_than_a_hundredth_stops_and_the_last_checkpoint_stays(
    tmp_path: Path, kind: str
) -> None:
    config = replace(CONFIG, augment=kind)
    next(fit(tmp_path, network(), config, data=TrainData(TRAIN, VAL, DATA)))
    stored = (tmp_path / runs.CHECKPOINT).read_bytes()
    data = TrainData(damaged(TRAIN, 5, 50), VAL, DATA)
    with pytest.raises(DataError, match=r"2 of 120 images, more than 1%, are unreadable: .* 5: "):
        list(fit(tmp_path, network(), config, data=data))
    assert (tmp_path / runs.CHECKPOINT).read_bytes() == stored
