"""The short form of `kill.py`: a few kills of what writes stores, masks and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill.py")


@pytest.mark.slow
def test_a_killed_command_run_again_makes_what_it_always_makes() -> None:
    command = [
        sys.executable,
        SCRIPT,
        "--kills",
        "2",
        "train",
        "extract",
        "stitch",
        "prune",
        "finetune",
    ]
    root = str(SCRIPT.parent.parent.parent)
    done = subprocess.run(
        command, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 differences") == 5
