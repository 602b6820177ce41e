"""Kill every command at random moments; what the same command makes then is what it always makes.

python tests/faults/kill.py [--kills N] [--seed S] [COMMAND ...]

Each command runs undisturbed, then again and again from the same start, killed by SIGKILL at a
random moment and run once more. Stores and masks must be the same to the byte, weights to the bit,
on one thread; of manifests and metrics all but times. No file that was being made may be left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from small_space import STAGES, begin, contents  # beside this folder

COMMANDS = {
    "init": "init --data {root}/data --size 32 --teacher resnet20 --force",
    "train": "train --epochs 3",
    "extract": "extract",
    "stitch": "stitch --per-class 30",
    "prune": "prune --criterion iter-snip --rounds 8",
    "finetune": "finetune --epochs 3",
    "sanity": "sanity --criterion snip --material images --start 6 --budget 12 --splits 2",
    "report": "report",
    "show": "show concepts",
}
TIMES = ("started", "finished", "images_per_s", "time_s", "commit")


def draw_images(root: Path) -> None:
    """Make 3 classes of striped noise, 12 to train on and 6 held out."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        for part, count in (("train", 12), ("val", 6)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 90, (40, 48, 3), np.uint8)
                pixels[:: 2 + label, :, label] += 150
                Image.fromarray(pixels).save(root / part / name / f"{index:02}.png")


def start(root: Path, command: str) -> int:
    """Run a command in a fork, which imports nothing anew; return its process."""
    child = os.fork()
    if child:
        return child
    with Path(os.devnull).open("w") as quiet:
        os.dup2(quiet.fileno(), 1)
    os.chdir(root)
    sys.argv = ["dopfast", *command.format(root=root).split(), "-q", "-w", str(root)]
    from dop_fast.cli.main import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing of the parent's goes on in here


def finish(root: Path, command: str) -> float:
    """Run a command to its end and return the seconds it took."""
    began = time.perf_counter()
    _, status = os.waitpid(start(root, command), 0)
    if status:
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began


def made(root: Path) -> dict[str, object]:
    """Return what is in the workspace, JSON without its times."""
    found: dict[str, object] = dict(contents(root))
    for path in root.rglob("*.json*"):
        if path.name != "zarr.json":
            rows = [json.loads(text) for text in path.read_text().splitlines()] \
                if path.suffix == ".jsonl" else json.loads(path.read_text())  # fmt: skip
            found[str(path.relative_to(root))] = timeless(rows)
    for path in root.rglob("checkpoint.safetensors"):  # its metadata tell the epochs' times
        found.pop(str(path.relative_to(root)))
    found.pop("report.html", None)  # tells of them too
    return found


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in TIMES}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def differences(root: Path, expected: dict[str, object]) -> list[str]:
    found = made(root)
    return sorted(path for path in found.keys() | expected.keys()
                  if found.get(path) != expected.get(path))  # fmt: skip


def kill_often(home: Path, name: str, kills: int, lot: random.Random) -> tuple[int, list[str]]:
    """Return how many of `kills` met the command at work, and what went wrong."""
    before, root, command = home / f"before-{name}", home / "space", COMMANDS[name]
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root)
    time_s = finish(root, command)
    expected, met, wrong = made(root), 0, []
    for _ in range(kills):
        shutil.rmtree(root)
        shutil.copytree(before, root)
        child = start(root, command)
        time.sleep(at := lot.uniform(0, time_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        met += os.WIFSIGNALED(status)
        finish(root, command)
        wrong += [f"{name} killed after {at:.3f} s: {path}" for path in differences(root, expected)]
    return met, wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch

    from dop_fast import pipeline, report, sanity  # noqa: F401  # what forks need not import

    torch.set_num_threads(1)
    lot, failed = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        draw_images(home / "images")
        begin(home / "all", home / "images")
        for name in COMMANDS:  # each begins where those before it ended
            shutil.copytree(home / "all", home / f"before-{name}")
            if name in STAGES:
                finish(home / "all", COMMANDS[name])
        for name in asked.commands or COMMANDS:
            met, wrong = kill_often(home, name, asked.kills, lot)
            print(
                f"{name:<9} {met} of {asked.kills} kills met it at work, {len(wrong)} differences"
            )
            failed += wrong
    print("\n".join(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
