import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import CONFIG, fit, network

from dop_fast import runs
from dop_fast.errors import ConfigError

CONFIG = replace(CONFIG, epochs=3, tensorboard=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own code
def test_tensorboard_shows_what_the_metrics_say_after_an_interruption_too(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    epochs = fit(tmp_path, network(), CONFIG)
    next(epochs)
    epochs.close()
    list(fit(tmp_path, network(), CONFIG))
    events = reading.EventAccumulator(str(tmp_path / runs.BOARD))
    events.Reload()
    rows = runs.metrics(tmp_path)
    assert set(events.Tags()["scalars"]) == rows[0].keys() - {"epoch"}
    for name in ("top1", "train_loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["epoch"], pytest.approx(row[name])) for row in rows]  # float32 there
        assert found == expected


def test_without_tensorboard_the_way_to_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed") as caught:
        next(fit(tmp_path, network(), CONFIG))
    assert "dopfast[tensorboard]" in caught.value.hint
    assert not (tmp_path / runs.CHECKPOINT).exists()
