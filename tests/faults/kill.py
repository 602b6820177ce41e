"""Kill every command at random; what the same command makes then is what it always makes.

python tests/faults/kill.py [--kills N] [--seed S] [COMMAND ...]

Each command runs undisturbed, then again and again from the same start, killed by SIGKILL and run
once more: N times at a random moment, and N times before a random one of its operations on files,
which time alone would seldom meet. Each draw is from one of N equal parts of its work; where the
command was done sooner than it was killed, it is killed earlier. Stores, masks and exported files
must be the same to the byte, weights to the bit, on one thread; of manifests and metrics all but
times. No file that was being made may be left. The demo is made small: fewer images and epochs.
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
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from small_space import STAGES, begin, contents  # beside this folder

from dop_fast.models import fingerprint

IN_SPACE = {
    "init": "init --data {root}/data --size 32 --teacher resnet20",
    "train": "train --epochs 15",
    "extract": "extract",
    "stitch": "stitch --per-class 100",
    "prune": "prune --criterion iter-snip --rounds 12",
    "finetune": "finetune --epochs 15",
    "sanity": "sanity --criterion snip --material images,stitched --start 6 --budget 12 --splits 2",
    "report": "report",
    "show": "show concepts",
    "sweep": "sweep {root}/few.toml",
    "export-masks": "export masks",
    "export-dense": "export dense",
    "export-prune": "export prune",
    "export-csr": "export csr",
    "export-onnx": "export onnx",
    "import": "import {root}/theirs.safetensors",
    "train-force": "train --epochs 12 --force",
    "extract-force": "extract --clusters 5 --force",
    "stitch-force": "stitch --per-class 100 --sigma 0.7 --force",
    "prune-force": "prune --criterion iter-snip --rounds 12 --force",
    "finetune-force": "finetune --epochs 12 --force",
    "sweep-force": "sweep {root}/few.toml --force",
}
COMMANDS = {
    **{name: f"{command} -w {{root}}" for name, command in IN_SPACE.items()},
    "demo": "demo -o {root}/demo",
    "demo-force": "demo -o {root}/demo --force",
}
FIRST = {  # what is there already, beside every stage
    "import": "export prune -o {root}/theirs.safetensors -w {root}",
    "sweep-force": COMMANDS["sweep"],
    "demo-force": COMMANDS["demo"],
}
SWEEP = """
criteria = ["snip"]
materials = ["images", "stitched"]
sparsities = [0.5]
seeds = 1
stitch = { sigma = 0.6, per_class = 10 }
finetune = { epochs = 4, batch_size = 12, lr = 0.02 }
"""
TIMES = ("started", "finished", "images_per_s", "time_s", "commit")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link")


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


def start(root: Path, command: str, operation: int = 0) -> int:
    """Run a command in a fork, which imports nothing anew; return its process.

    It is killed before the operation on files of that number, where it is not 0.
    """
    child = os.fork()
    if child:
        return child
    with (root.parent / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(root)
    sys.argv = ["dopfast", *command.format(root=root).split(), "-q"]
    make_demo_small()
    from dop_fast.cli.main import main

    code, done = 1, [0]
    sys.addaudithook(partial(count, root, done, operation))
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        (root.parent / "operations").write_text(str(done[0]))
        os._exit(code)  # nothing of the parent's goes on in here


def count(root: Path, done: list[int], fatal: int, event: str, args: tuple[Any, ...]) -> None:
    """Count what is done to files below `root`; die before the `fatal`th."""
    changes = event in OPERATIONS or (event == "open" and args[2] & WRITES)
    in_folder = event in ("os.remove", "os.rmdir") and args[1] >= 0  # rmtree names no root
    if changes and (in_folder or str(args[0]).startswith(str(root))):
        done[0] += 1
        if done[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def make_demo_small() -> None:
    from dop_fast import demo, showcase

    showcase.TEACHER = replace(showcase.TEACHER, epochs=3)
    showcase.STUDENT = replace(showcase.STUDENT, epochs=2)
    showcase.EXTRACT = replace(showcase.EXTRACT, images=6, tcav_images=4, random_sets=4)
    showcase.RIVALS = showcase.RIVALS[2:]
    if not isinstance(demo.write_images, partial):
        demo.write_images = partial(demo.write_images, train=12, val=2)


def finish(root: Path, command: str) -> float:
    """Run a command to its end and return the seconds it took."""
    began = time.perf_counter()
    _, status = os.waitpid(start(root, command), 0)
    if status:
        raise SystemExit(f"{command} failed: {(root.parent / 'said').read_text()}")
    return time.perf_counter() - began


def made(root: Path) -> dict[str, object]:
    """Return what is in the workspace, but for times."""
    found: dict[str, object] = dict(contents(root))
    for path in root.rglob("*.json*"):
        if path.name != "zarr.json" and path.is_file():
            rows = [json.loads(text) for text in path.read_text().splitlines()] \
                if path.suffix == ".jsonl" else json.loads(path.read_text())  # fmt: skip
            found[str(path.relative_to(root))] = timeless(rows)
    for path in root.rglob("checkpoint.safetensors"):  # its metadata tell the epochs' times
        found[str(path.relative_to(root))] = fingerprint(load_file(path))
    for path in root.rglob("demo/report.html"):  # tells of them too
        found[str(path.relative_to(root))] = ""
    for path in root.rglob("*.partial"):  # a folder too, with nothing in it
        found[str(path.relative_to(root))] = "left"
    return found


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in TIMES}
    return [timeless(value) for value in content] if isinstance(content, list) else content


class Met(NamedTuple):
    """A kill that met its command at work, when a share of it was done, and after how many tries.

    `wrong`: the files that differ once it was run again.
    """

    share: float
    tries: int
    wrong: list[str]


class Trial:
    """A command, the state that it begins from, and what it makes undisturbed."""

    def __init__(self, home: Path, name: str) -> None:
        self.before, self.root = home / f"before-{name}", home / "space"
        self.command = COMMANDS[name]
        times = []
        for _ in range(3):
            self.restore()
            times.append(finish(self.root, self.command))
        self.time_s, self.expected = min(times), made(self.root)
        self.operations = int((home / "operations").read_text())

    def restore(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before, self.root, symlinks=True)

    def killed(self, share: float, by_time: bool) -> bool:
        """Kill it when that share of its work is done; return whether it was still at work."""
        self.restore()
        if by_time:
            child = start(self.root, self.command)
            time.sleep(share * self.time_s)
            os.kill(child, signal.SIGKILL)
        else:
            child = start(self.root, self.command, max(1, round(share * self.operations)))
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def differences(self) -> list[str]:
        """Run it once more; return the files that differ then."""
        try:
            finish(self.root, self.command)
        except SystemExit as error:
            return [str(error)]
        found = made(self.root)
        return sorted(path for path in found.keys() | self.expected.keys()
                      if found.get(path) != self.expected.get(path))  # fmt: skip

    def run(self, kills: int, by_time: bool, lot: random.Random) -> Iterator[Met]:
        """Kill it in each of as many equal parts of its work."""
        for part in range(kills):
            share, tries = (part + lot.random()) / kills, 1
            while not self.killed(share, by_time):
                share, tries = 0.9 * share, tries + 1
            yield Met(share, tries, self.differences())


def begin_each(home: Path, asked: list[str]) -> None:
    """Make the state that each command begins from: where the stages before it ended."""
    draw_images(home / "images")
    begin(home / "all", home / "images")
    (home / "all/few.toml").write_text(SWEEP)
    for name in COMMANDS:
        before = home / f"before-{name}"
        if name in asked:
            shutil.copytree(home / "all", before)
        if name in STAGES:
            finish(home / "all", COMMANDS[name])
    for name, first in FIRST.items():
        if name in asked:
            finish(home / f"before-{name}", first)
    if "init" in asked:
        (home / "before-init/dopfast.toml").unlink()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch

    # what forks need not import
    from dop_fast import interop, pipeline, report, sanity, showcase, sweep  # noqa: F401
    from dop_fast.interop import graphs  # noqa: F401

    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        names = asked.commands or [*COMMANDS]
        begin_each(Path(folder), names)
        for name in names:
            trial = Trial(Path(folder), name)
            for by_time in (True, False):
                of = f"{trial.time_s:.2f} s" if by_time else f"{trial.operations} operations"
                lot = random.Random(f"{asked.seed} {name} {by_time}")  # alone as among others
                done = list(trial.run(asked.kills, by_time, lot))
                wrong = [f"{name} killed at {met.share:.3f} of {of}: {path}"
                         for met in done for path in met.wrong]  # fmt: skip
                tries = sum(met.tries for met in done)
                print(f"{name:<14} {len(done)} kills met it at work, of {tries}, "
                      f"in {of}: {len(wrong)} differences", flush=True)  # fmt: skip
                failed += wrong
    print("\n".join(failed))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
