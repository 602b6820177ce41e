"""Activations of the random sets on disk: made once for a teacher, a layer and its images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from dop_fast import __version__, ranks
from dop_fast.places import DAMAGE, WHOLE, Place

Pool: TypeAlias = tuple[Tensor, NDArray[np.int64]]
"""Rows [n d], float32 or bfloat16, and the classes int64[n] that they come from."""
SCHEMA, VERSION = "dopfast.random", 1
CODEC = (BloscCodec(cname="lz4", clevel=1), Crc32cCodec())
ROWS = 32  # in a file


def remembered(address: Path | str | None, key: dict[str, Any], make: Callable[[], Pool]) -> Pool:
    """Return what `make` does, on the CPU; from `address` if it was stored there under `key`.

    Anything else that is there is replaced; without an address nothing is stored. Where a rank
    finds nothing, all of them make it, and the first one stores it.
    """
    if address is None:
        return make()
    place = Place(address)
    about = {"schema": SCHEMA, "version": VERSION, "dopfast": __version__, "key": key}
    found = _read(place, about)
    if not all(ranks.gather(found is not None)):
        found = made = make()
        ranks.once(partial(_write, place, about, made))
    assert found is not None  # read or made
    return found


def _read(place: Place, about: dict[str, Any]) -> Pool | None:
    """Return what is stored; None where there is nothing, something else, or a damaged store."""
    try:
        if place.attributes() != {**about, "finished": True}:
            return None
        columns = place.read(("rows", "labels"))
    except DAMAGE:
        return None
    rows = torch.from_numpy(columns["rows"])
    return rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows, columns["labels"]


def _write(place: Place, about: dict[str, Any], pool: Pool) -> None:
    rows = pool[0].cpu()
    bits = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    begun = place.begin()
    begun.remove()
    group = begun.group("a", about)
    chunks = (min(ROWS, len(bits)), bits.shape[1])
    group.create_array("rows", data=bits, chunks=chunks, compressors=CODEC, config=WHOLE)
    group.create_array("labels", data=pool[1], compressors=CODEC, config=WHOLE)
    place.finish(begun)
