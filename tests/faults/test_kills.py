"""The short form of `kill.py`: a few kills of what writes stores, masks, weights and results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill.py")
COMMANDS = (
    "train", "extract", "stitch-force", "prune", "finetune", "sanity", "export-masks",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_run_again_makes_what_it_always_makes() -> None:
    command = [sys.executable, SCRIPT, "--kills", "1", *COMMANDS]
    root = str(SCRIPT.parent.parent.parent)
    done = subprocess.run(
        command, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 differences") == 2 * len(COMMANDS)  # at a moment, at a file
