"""A zarr group as an xarray Dataset, whatever is wrong with it being one error that names the group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr
import zarr
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing  # not public, but xarray's guide to backends uses it
from zarr.storage import LocalStore

from svf_lightning.errors import DamagedError, damaged
from svf_lightning.zarr_files import DIMENSIONS, Chunks, read_metadata

if TYPE_CHECKING:
    import numpy as np
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


def open_group(path: Path) -> xr.Dataset:
    """The arrays of a group, loaded when they are looked at; attributes are those of the group.

    Raises:
        DamagedError: It cannot be read. Reading the arrays raises it, too.
    """
    try:
        return xr.open_dataset(path, engine=_Groups, cache=True, chunks=None, decode_cf=False)
    except DamagedError:
        raise
    except Exception as error:  # zarr and xarray raise errors of many types for damaged files
        raise damaged(path, error) from error


class _Groups(BackendEntrypoint):
    """Tells xarray how to open a group; xarray keeps in memory what was read."""

    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(self, filename_or_obj: Any, *, drop_variables: Any = None) -> xr.Dataset:
        path = Path(filename_or_obj)
        entries = read_metadata(path)
        names = [name.split("/")[0] for name in entries if name.endswith("/.zarray")]
        store = _CheckedStore(path, read_only=True)
        store.chunks = {name: Chunks.of(entries, name) for name in names}
        group = zarr.open_group(store, mode="r", zarr_format=2, use_consolidated=True)
        variables = {}
        for name in names:
            dims = entries[f"{name}/.zattrs"][DIMENSIONS]
            variables[name] = xr.Variable(dims, indexing.LazilyIndexedArray(_Stored(path / name, group[name])))
        return xr.Dataset(variables, attrs=entries[".zattrs"])


class _Stored(BackendArray):
    """An array of a group."""

    def __init__(self, path: Path, array: Any) -> None:
        self._path, self._array = path, array
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        try:
            values: np.ndarray = self._array.oindex[key]
        except Exception as error:  # zarr and its codecs raise errors of many types for damaged files
            raise damaged(self._path, error) from error
        return values


class _CheckedStore(LocalStore):
    """The files of a group."""

    chunks: Mapping[str, Chunks] = {}  # by the name of the array

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The content of a file; None if there is none.

        Raises:
            ValueError: It is a chunk that cannot be what was written.
        """
        content = await super().get(key, prototype, byte_range)
        array, _, file = key.rpartition("/")
        if array in self.chunks and not file.startswith("."):
            self.chunks[array].check(None if content is None else content.to_bytes())
        return content
