"""The tiny images and a store of their patches."""

from pathlib import Path

import pytest
from little_store import CLASSES, FILL, SIZE, concepts_of

from dop_fast.config import DataConfig, StitchConfig
from dop_fast.images import ImageSet, open_images
from dop_fast.patches import stitching
from dop_fast.stores import Header, PatchStore, PatchWriter


@pytest.fixture(scope="module")
def data(tiny_images: Path) -> DataConfig:
    return DataConfig(path=str(tiny_images), size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def images(data: DataConfig) -> ImageSet:
    return open_images(data, Path(), 0)[0]


@pytest.fixture(scope="module")
def store(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    header = Header(
        images.classes, (SIZE, SIZE), FILL, images.fingerprint, "teacher", "layer", {"top": 3}
    )
    writer = PatchWriter(tmp_path_factory.mktemp("store") / "patches.zarr", header)
    for class_id in range(CLASSES):
        writer.write(concepts_of(images, class_id))
    made = writer.finish()
    config = StitchConfig(sigma=0.5, per_class=6)
    parts = stitching.stitch_all(made, images, config, 0)
    made.write_stitched(parts, 6 * CLASSES, config.to_dict())
    return made
