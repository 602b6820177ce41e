"""The checksum inside a safetensors file: CRC-32C of all its bytes, with zeros in its own place.

The metadata key `crc32c` holds it, in eight hexadecimal digits. Files of others have none.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import google_crc32c

EMPTY = {"crc32c": "00000000"}
"""Metadata of a file that is to be stamped."""
_SPOT = re.compile(rb'"crc32c": ?"([0-9a-f]{8})"')
_BLOCK = 1 << 20


class _Seal(NamedTuple):
    offset: int
    stored: bytes
    found: bytes


def stamp(path: Path) -> None:
    """Write the checksum of a file that was made with `EMPTY` among its metadata.

    Its header is sorted before, which comes in an order that varies: equal content, equal bytes.
    """
    _sort_header(path)
    seal = _read(path)
    assert seal is not None and seal.stored == EMPTY["crc32c"].encode()
    with path.open("r+b") as file:
        file.seek(seal.offset)
        file.write(seal.found)


def _sort_header(path: Path) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        # compact, as it was: of the same length
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content = text.encode().ljust(length)
        assert len(content) == length
        file.seek(8)
        file.write(content)


def has(path: Path) -> bool:
    """Return whether the file has a checksum."""
    return _read(path) is not None


def broken(path: Path) -> bool:
    """Return whether the file has a checksum, and it is that of other bytes."""
    seal = _read(path)
    return seal is not None and seal.stored != seal.found


def _read(path: Path) -> _Seal | None:
    with path.open("rb") as file:
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), path.stat().st_size)
        start += file.read(length)
        spot = _SPOT.search(start)
        if spot is None:
            return None
        first, last = spot.span(1)
        checksum = google_crc32c.value(start[:first] + EMPTY["crc32c"].encode() + start[last:])
        while block := file.read(_BLOCK):
            checksum = google_crc32c.extend(checksum, block)
    return _Seal(first, spot[1], f"{checksum:08x}".encode())
