"""The labelled store of everything captured over time: one zarr group per run, opened as an xarray Dataset.

How a row becomes visible: its chunks are written first, each by an atomic rename; then the consolidated metadata, one
file that holds the shapes of all arrays and the number of rows, is replaced by an atomic rename. Readers look at the
consolidated metadata alone, so they see a row in all arrays or in none, while a run goes on and after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svf_lightning.errors import InputError

if TYPE_CHECKING:
    import xarray as xr
    import zarr

FILE_NAME = "trajectory.zarr"
FORMAT = 1
_SCALARS = "scalars"
_MAX_CHUNK_BYTES = 4 << 20

Column = tuple[tuple[str, ...], np.ndarray]


def open_trajectory(run_dir: str | Path) -> xr.Dataset:
    """Everything that a run captured, as a lazily loaded xarray Dataset.

    Args:
        run_dir: A run directory (``runs/<experiment>/<run id>``). The run may still be going on.

    Returns:
        Dataset with the dimension ``step`` (the training step is its coordinate), the module's own batch dimensions
        (``instance`` for the toy model) and named ones (``feature``, ``rank``, ``d_model``, ``pair``). Scalars carry
        the metric names (``alignment/matched``); a row holds the weights after ``step`` updates and the losses of
        these weights on the draw of that step.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    import xarray as xr

    path = Path(run_dir)
    path = path if path.suffix == ".zarr" else path / FILE_NAME
    if not (path / ".zmetadata").is_file():
        raise InputError(
            f"{path} is not a trajectory. Allowed: a run directory with at least one captured row. "
            "Fix: pass the directory that `fit` printed as its last line."
        )
    try:
        dataset = xr.open_zarr(path, consolidated=True, chunks=None)
        dataset = dataset.isel(step=slice(0, dataset.attrs["n_rows"]))
        names = dataset.attrs["scalars"]
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}). Fix: the file is damaged; repeat the run.") from error
    scalars = {name: dataset[_SCALARS].isel(scalar=i) for i, name in enumerate(names)}
    attributes = {k: v for k, v in dataset.attrs.items() if k not in ("n_rows", "scalars")}
    dataset = dataset.drop_vars(_SCALARS).assign(scalars)
    dataset.attrs = attributes
    return dataset.rename({name: name.replace(".", "/") for name in dataset.data_vars if "." in str(name)})


class TrajectoryStore:
    """Appends rows to a trajectory; one writer at a time.

    Args:
        run_dir: The run directory; the store is its ``trajectory.zarr``.
        rows_per_chunk: Rows that an :meth:`append` usually brings; storage chunks are multiples of it.
    """

    def __init__(self, run_dir: str | Path, *, rows_per_chunk: int = 64) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self.rows_per_chunk = rows_per_chunk
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}

    def __len__(self) -> int:
        return int(self._open().attrs["n_rows"]) if self.exists else 0

    @property
    def exists(self) -> bool:
        """True once a row was written."""
        return self._group is not None or (self.path / ".zmetadata").is_file()

    def append(
        self, columns: Mapping[str, Column], *, batch_dims: tuple[str, ...], coords: Mapping[str, Column] | None = None
    ) -> None:
        """Write rows and make them visible together.

        Args:
            columns: By name: (dimensions after ``step``, values [K, ...]). "step" must be among them, ascending.
                Columns whose dimensions are just ``batch_dims`` are stored together as scalars.
            batch_dims: The module's batch dimensions, e.g. ("instance",).
            coords: Labels without a step dimension; taken from the first call only.

        Raises:
            InputError: Names or shapes differ from those of the rows already there.
        """
        scalars = sorted(name for name, (dims, _) in columns.items() if dims == batch_dims)
        packed = {_SCALARS: ((*batch_dims, "scalar"), _pack([columns[name][1] for name in scalars]))} if scalars else {}
        arrays = {name.replace("/", "."): column for name, column in columns.items() if name not in scalars} | packed
        if not self.exists:
            self._create(arrays, scalars, coords or {})
        group = self._open()
        if list(group.attrs["scalars"]) != scalars or set(self._arrays) != set(arrays):
            raise InputError(
                f"{self.path} holds other quantities than this run measures. Fix: resume with the callbacks of the "
                "first run, or start a new run."
            )
        start = len(self)
        stop = start + len(columns["step"][1])
        for name, (_, values) in arrays.items():
            array = self._arrays[name]
            if array.shape[1:] != values.shape[1:]:
                raise InputError(f"{self.path} holds {name} of shape {array.shape[1:]}, not {values.shape[1:]}")
            if array.shape[0] != stop:
                array.resize((stop, *array.shape[1:]))
            array[start:stop] = values
        self._commit(stop)

    def truncate(self, before_step: int) -> None:
        """Forget the rows of ``before_step`` and later, as a run that goes on from there will write them again."""
        steps = np.asarray(self._open()["step"][: len(self)])
        keep = int(np.searchsorted(steps, before_step))
        self._commit(keep)  # readers let go of the rows before their chunks disappear
        for array in self._arrays.values():
            array.resize((keep, *array.shape[1:]))
        self._commit(keep)

    def _create(self, arrays: Mapping[str, Column], scalars: list[str], coords: Mapping[str, Column]) -> None:
        import zarr
        from numcodecs import Blosc

        self.path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(self.path, mode="w", zarr_format=2)
        group.attrs.update(format=FORMAT, n_rows=0, scalars=scalars)
        codec = Blosc(cname="zstd", clevel=1, shuffle=Blosc.BITSHUFFLE)
        for name, (dims, values) in arrays.items():
            row_bytes = max(1, values[0].nbytes)
            rows = self.rows_per_chunk
            while rows < 1024 and 2 * rows * row_bytes <= _MAX_CHUNK_BYTES:
                rows *= 2
            group.create_array(
                name,
                shape=(0, *values.shape[1:]),
                chunks=(rows, *(max(1, size) for size in values.shape[1:])),
                dtype=values.dtype,
                compressors=codec,
                fill_value=None,
                attributes={"_ARRAY_DIMENSIONS": ["step", *dims]},
            )
        for name, (dims, values) in coords.items():
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                fill_value=None,
                attributes={"_ARRAY_DIMENSIONS": list(dims)},
            )
            array[...] = values
        group.attrs["coordinates"] = " ".join(["step", *coords])
        self._group = group
        self._arrays = {name: group[name] for name in arrays}

    def _open(self) -> zarr.Group:
        import zarr

        if self._group is None:
            self._group = zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
            # the consolidated copy is the truth about rows: a kill may have come before it was replaced
            committed = zarr.open_group(self.path, mode="r", zarr_format=2, use_consolidated=True)
            self._group.attrs["n_rows"] = committed.attrs["n_rows"]
            self._arrays = {
                name: array
                for name, array in self._group.arrays()
                if array.attrs["_ARRAY_DIMENSIONS"][0] == "step"  # type: ignore[index]
            }
        return self._group

    def _commit(self, n_rows: int) -> None:
        import zarr

        self._open().attrs["n_rows"] = n_rows
        zarr.consolidate_metadata(str(self.path), zarr_format=2)


def _pack(values: list[np.ndarray]) -> np.ndarray:
    dtype = np.result_type(*values)
    return np.stack([v.astype(dtype, copy=False) for v in values], axis=-1)
