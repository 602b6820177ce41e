"""A shard against what Zarr itself writes."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from dop_fast import shards


@pytest.mark.parametrize("sizes", [(1,), (4,), (12,), (5, 7), (1, 1, 9, 1), (3, 0, 2)])
def test_a_shard_is_to_the_byte_what_zarr_writes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(sum(sizes))
    parts = [rng.integers(0, 3, (size, 5, 7, 3), np.uint8) for size in sizes]
    parts[0][:] = 0  # a chunk of the fill value is written as any other
    whole = np.concatenate(parts)
    arrays = [
        zarr.create_array(
            tmp_path / name, name="pixels", shape=(12 + len(whole), 5, 7, 3), dtype=np.uint8,
            chunks=(4, 5, 7, 3), shards=(12, 5, 7, 3), compressors=shards.CODEC,
            config={"write_empty_chunks": True},
        )
        for name in ("ours", "zarr")
    ]  # fmt: skip
    shards.write(arrays[0], 1, parts)
    arrays[1][12:] = whole
    ours, theirs = (
        (tmp_path / name / "pixels/c/1/0/0/0").read_bytes() for name in ("ours", "zarr")
    )
    assert ours == theirs
    np.testing.assert_array_equal(arrays[0][12:], whole)
