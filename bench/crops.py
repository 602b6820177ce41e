"""How much of a patch the published crop leaves, against one that guarantees a share of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _timing import Row, arguments, report
from stitch import FILL, one_class, photographs

from dop_fast import workspace
from dop_fast.concepts.segments import collect
from dop_fast.config import ExtractConfig, StitchConfig
from dop_fast.kernels.slic import slic
from dop_fast.patches import baselines, cropping, dop
from dop_fast.patches.stitching import stitch_class
from dop_fast.seeding import stream
from dop_fast.stores import PatchStore
from dop_fast.types import Array, ClassConcepts, Segments


def masks_of(segments: Segments, index: Array) -> list[Array]:
    """Return where each of the segments lies, bool[h w] each."""
    found = []
    for i in index:
        top, left, bottom, right = segments.box[i]
        valid = np.zeros(segments.canvas, np.bool_)
        valid[top:bottom, left:right] = segments.mask(i)
        found.append(valid)
    return found


def of_store(path: Path) -> dict[str, list[Array]]:
    """Return the patches' pixels of every kind that a workspace's store holds."""
    store = PatchStore(workspace.load(path).patches)
    found: dict[str, list[Array]] = {"DOP patches": [], "random segments": []}
    for class_id in range(len(store.header.classes)):
        own = store.concepts(class_id)
        members = sum(len(concept.members) for concept in own.concepts)
        chosen = dop.choose(own, min(30, members), 0)
        found["DOP patches"] += masks_of(own.segments, chosen)
        chosen = baselines.random_segments(own, min(30, len(own.segments)), 0)
        found["random segments"] += masks_of(own.segments, chosen)
    if store.stitching:
        sigma = store.stitching["sigma"]
        found[f"stitched at sigma {sigma:g}"] = list(store.stitched().valid)
    return found


def of_photographs() -> dict[str, list[Array]]:
    """Return SLIC segments of the two photographs of scikit-learn, and stitched ones of them."""
    rng = np.random.default_rng(0)
    sources = photographs(20, rng)
    found = {}
    for count in (15, 50, 80):
        segments = collect(slic(sources, (count,)), (count,), ExtractConfig())
        chosen = rng.permutation(len(segments))[:100]
        found[f"SLIC segments, {count} an image"] = masks_of(segments, chosen)
    own: ClassConcepts
    own, pixels = one_class(photographs(40, rng), rng)
    for sigma in (0.5, 0.75):
        config = StitchConfig(sigma=sigma, per_class=30)
        made = stitch_class(own, lambda index: pixels[index], config, FILL, 0)
        found[f"stitched at sigma {sigma:g}"] = list(made.valid)
    return found


def crops_of(patches: Sequence[Array], augment: cropping.Augment, draws: int) -> Array:
    """Return of each crop the share of the patch it keeps, and how much of it is patch: [n 2]."""
    rows = []
    for number, valid in enumerate(patches):
        for draw in range(draws):
            rng = stream(0, "bench", number, draw)
            top, left, height, width = cropping.choose_box(valid, augment, rng)
            inside = valid[top : top + height, left : left + width]
            rows.append((inside.sum() / valid.sum(), inside.mean()))
    return np.array(rows)


def rows_of(what: str, patches: Sequence[Array], draws: int) -> list[Row]:
    """Compare the two crops on one kind of material; no ratio: which is better, masks decide."""
    ours, peer = (crops_of(patches, augment, draws) for augment in ("guaranteed", "published"))
    area = np.mean([valid.mean() for valid in patches])
    what = f"{what} ({len(patches)}, covering {area:.1%})"
    measures = {
        "crops without a patch pixel": lambda found: (found[:, 0] == 0).mean(),
        "share of the patch kept": lambda found: found[:, 0].mean(),
        "patch pixels in the crop": lambda found: found[:, 1].mean(),
    }
    return [
        Row(f"{what}: {name}", "cpu", 100 * of(ours), 100 * of(peer), "%", None, None)
        for name, of in measures.items()
    ]


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--workspace", type=Path, help="measure on its patches too")
    options = parser.parse_args()
    kinds = of_photographs()
    if options.workspace:
        kinds |= {f"workspace: {k}": masks for k, masks in of_store(options.workspace).items()}
    draws = 20 if options.quick else 100
    rows = [row for what, masks in kinds.items() if masks for row in rows_of(what, masks, draws)]
    report(rows, ("dopfast", "numpy", "opencv-python-headless"), options.json)


if __name__ == "__main__":
    main()
