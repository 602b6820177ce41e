"""The measured values of a training, for TensorBoard."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dop_fast.errors import ConfigError


class Board:
    """Event files in a folder, which it makes anew: they say what metrics.jsonl says."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "TensorBoard is not installed", "run: pip install 'dopfast[tensorboard]'"
            ) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        self._written = 0

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the epochs that are not there yet."""
        for row in rows[self._written :]:
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, row["epoch"])
        self._written = len(rows)
        self._writer.flush()
