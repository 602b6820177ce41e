"""What every bench script needs: fair timing, a record of the machine, one form of report."""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One claim: `ratio` is above 1 where ours is better; `peer` is None where not installed."""

    what: str
    device: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    goal: float | None


def faster(
    what: str, ours: float, peer: float | None, goal: float | None = None, **where: str
) -> Row:
    """Return the row of two costs (lower is better); `where`: `device`, `unit`."""
    ratio = None if peer is None else peer / ours
    return Row(what, where.get("device", "cpu"), ours, peer, where.get("unit", "ms"), ratio, goal)


def arguments(
    description: str, *, bsds: bool = False, data: bool = False
) -> argparse.ArgumentParser:
    """Return the options common to the scripts; a script may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats")
    parser.add_argument("--json", type=Path, help="write the rows, machine and versions here")
    if data:
        parser.add_argument("--data", type=Path, help="folder of flowers.zip and cifar10.zip")
    if bsds:
        parser.add_argument("--bsds", type=Path, help="folder of BSDS500 (images and groundTruth)")
    return parser


def data_folder(option: Path | None) -> Path | None:
    """Return `option`, else $DOPFAST_DATA, else shared/data beside the repository, if it exists."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = option or Path(os.environ.get("DOPFAST_DATA", beside))
    return folder if folder.is_dir() else None


def alternate(
    jobs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.thread_time,
    sync: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of each job, run in turn so that all meet the same moods of the machine.

    The default clock counts this thread's CPU time, so other processes do not; give
    `time.perf_counter` (and `sync`, such as `torch.cuda.synchronize`) for threads or a GPU.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()  # compile, and fill the caches
    for _ in range(repeats):
        for name, job in jobs.items():
            sync()
            start = clock()
            job()
            sync()
            seconds[name].append(clock() - start)
    return seconds


def machine() -> dict[str, str | int]:
    """Return what the figures depend on, without naming the host."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count() or 1, "system": platform.system()}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(rows: Sequence[Row], packages: Sequence[str], path: Path | None) -> None:
    """Print the rows as a table; write them with machine and versions as JSON to `path`."""
    cells: list[tuple[str, ...]] = [("what", "device", "ours", "peer", "unit", "ratio", "goal", "")]
    for row in rows:
        numbers = [_text(x) for x in (row.ours, row.peer)]
        met = "" if None in (row.ratio, row.goal) else "met" if _met(row) else "short"
        tail = (row.unit, _text(row.ratio), _text(row.goal), met)
        cells.append((row.what, row.device, *numbers, *tail))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip())
    if path is not None:
        record = {"machine": machine(), "versions": versions(packages)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | {"rows": [asdict(x) for x in rows]}, indent=1) + "\n")


def _met(row: Row) -> bool:
    return row.ratio is not None and row.goal is not None and row.ratio >= row.goal


def _text(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"
