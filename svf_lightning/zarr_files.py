"""What the files of a zarr group say of each other: damage is noticed wherever one of them can tell.

The consolidated metadata are compared with the metadata of each array; a chunk must be as long as its header says, and
where chunks have checksums, all must be there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from svf_lightning.errors import damaged

METADATA = ".zmetadata"  # consolidated: one file that says all
DIMENSIONS = "_ARRAY_DIMENSIONS"  # attribute, as xarray writes it
_OF_A_GROUP, _OF_AN_ARRAY = (".zgroup", ".zattrs"), (".zarray", ".zattrs")
_CHECKSUMS = ("crc32", "crc32c")  # codecs
_BLOSC_HEADER = 16  # bytes


def read_metadata(path: Path) -> dict[str, Any]:
    """The consolidated metadata of a group, by the names of its metadata files.

    Raises:
        DamagedError: They cannot be read, or another metadata file of the group contradicts them.
    """
    try:
        entries: dict[str, Any] = json.loads((path / METADATA).read_text(encoding="utf-8"))["metadata"]
        for name, entry in entries.items():
            *folder, kind = name.split("/")
            if len(folder) > 1 or kind not in (_OF_AN_ARRAY if folder else _OF_A_GROUP) or folder == [".."]:
                raise ValueError(f"{name!r} is no metadata file")
            if not (path / name).is_file():
                continue
            alone = json.loads((path / name).read_text(encoding="utf-8"))
            if kind == ".zarray" and is_along_steps(entries, *folder):
                # one tells how many rows are visible, the other how many there may be
                alone = {**alone, "shape": [*entry["shape"][:1], *alone["shape"][1:]]}
            if alone != entry:
                raise ValueError(f"{METADATA} and {name} contradict each other")
        return entries
    except Exception as error:  # what JSON of another structure raises
        raise damaged(path, error) from error


def is_along_steps(entries: Mapping[str, Any], array: str) -> bool:
    """True for an array of rows."""
    return bool(entries[f"{array}/.zattrs"][DIMENSIONS][:1] == ["step"])


class Chunks(NamedTuple):
    """What the chunks of an array are like.

    Args:
        n_bytes: Size of one without compression.
        always_there: Chunks with a checksum are written whatever is in them; others are left out where all is zero.
        is_blosc: Files are what Blosc makes, as in stores of versions that wrote no checksums.
    """

    n_bytes: int
    always_there: bool
    is_blosc: bool

    @classmethod
    def of(cls, entries: Mapping[str, Any], name: str) -> Chunks:
        """Those of an array in a group's metadata."""
        array = entries[f"{name}/.zarray"]
        codecs = [codec["id"] for codec in (*(array["filters"] or ()), array["compressor"]) if codec is not None]
        n_bytes = math.prod(array["chunks"]) * np.dtype(array["dtype"]).itemsize
        return cls(n_bytes, any(codec in _CHECKSUMS for codec in codecs), codecs == ["blosc"])

    def check(self, content: bytes | None) -> None:
        """Check the content of a chunk's file; None for no file.

        Raises:
            ValueError: It cannot be what was written.
        """
        if content is None:
            if self.always_there:
                raise ValueError("a chunk is missing")
        elif self.is_blosc:  # Blosc would read past the end of a file that was cut
            n_bytes, n_compressed = (int.from_bytes(content[at : at + 4], "little") for at in (4, 12))
            if len(content) < _BLOSC_HEADER or (n_bytes, n_compressed) != (self.n_bytes, len(content)):
                raise ValueError("a chunk is not as long as it was")
