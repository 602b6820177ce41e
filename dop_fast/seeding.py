"""Named random streams: one seed, and a path that says what the stream is for.

A stream depends on its path alone, so a new stage, another order of classes or more workers
shift nobody's draws.
"""

import hashlib

import numpy as np


def derive(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for the stream at `path`, e.g. `derive(0, "init")`."""
    text = "/".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """Return the NumPy generator at `path`, e.g. `stream(0, "stitch", class_id, image)`."""
    return np.random.default_rng(derive(seed, *path))
