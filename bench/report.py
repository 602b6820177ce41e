"""Size of the report, and CPU time and peak memory of writing it, as classes become many.

Every report is of a workspace of real segments and made-up concepts, 50 photographs of 500 x 375
pixels and 10 stitched patches a class, and is written in a process of its own: its time and
memory are those of `dopfast report`, most of which the libraries take before the first class.
"""

import tempfile
from pathlib import Path

from _jobs import is_job, measured
from _timing import Row, arguments, faster
from _timing import report as print_rows
from scale import IMAGES, SIDE, store_of, workspace_of

from dop_fast import pipeline, report, workspace
from dop_fast.config import StitchConfig

SIZES = 2, 10, 100, 1000
MEGABYTES_GOAL = 30.0


def write_job(root: Path) -> None:
    report.write(workspace.load(root))


def made(root: Path, classes: int) -> Path:
    """Return a workspace with all pictures that a report shows, made where it is not there."""
    space = root / f"{classes}"
    if not (space / workspace.TOML).is_file():
        store_of(workspace_of(space, classes, IMAGES, SIDE, "resnet18"))
        pipeline.stitch(workspace.load(space), StitchConfig(per_class=10), 0, force=True)
    return space


def main() -> None:
    if is_job({"write": write_job}):
        return
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=Path, help="make the data here, or find it here")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for classes in SIZES[:2] if options.quick else SIZES:
            space = made(options.keep or Path(folder), classes)
            used = measured(__file__, "write", str(space))
            megabytes = workspace.load(space).report.stat().st_size / 1e6
            what = f"report of {classes:,} classes"
            least = rows[2].ours if rows else used["mib"]
            rows += [
                faster(f"{what}: its file; the goal", megabytes, MEGABYTES_GOAL, 1.0, unit="MB"),
                faster(f"{what}: CPU time", used["cpu"], None, unit="s"),
                faster(f"{what}: peak memory; the fewest", used["mib"], least, 0.9, unit="MiB"),
            ]
    print_rows(rows, ["numpy", "pillow", "torch", "zarr", "jinja2"], options.json)


if __name__ == "__main__":
    main()
