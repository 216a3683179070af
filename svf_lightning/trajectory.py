"""The labelled store of everything captured over time: one zarr group per run, opened as an xarray Dataset.

How a row becomes visible: its chunks are written first, each by an atomic rename; then the consolidated metadata, one
file that holds the shapes of all arrays, is replaced by an atomic rename. Readers look at the consolidated metadata
alone, so they see a row in all arrays or in none, while a run goes on and after a kill.

What can be recomputed is not stored: cosines and Gram matrices follow from the features and the singular vectors, and
are computed when somebody looks at them, by the functions that the metrics use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from svf_lightning.errors import InputError
from svf_lightning.metrics import cosine_matrix, feature_dimensionality, gram
from svf_lightning.run_dir import write_text

if TYPE_CHECKING:
    import xarray as xr
    import zarr

FILE_NAME = "trajectory.zarr"
_PARTS = "trajectory*.zarr"  # trajectory.zarr, and trajectory.rank1.zarr ... of further devices
FORMAT = 1
_METADATA = ".zmetadata"
_PACK_BELOW = 4096  # bytes per row: quantities smaller than this share an array with their like
_CHUNK_BYTES = 4 << 20
_CAPACITY = 1 << 40  # rows that the arrays' own metadata announce; the consolidated metadata know how many there are

Column = tuple[tuple[str, ...], np.ndarray]


class _Derivation(NamedTuple):
    sources: tuple[str, ...]
    dims: tuple[str, ...]  # trailing dimensions
    compute: Callable[..., torch.Tensor]


_DERIVED = {
    "cosine_left": _Derivation(("W", "U"), ("feature", "rank"), cosine_matrix),
    "cosine_right": _Derivation(("W", "V"), ("feature", "rank"), cosine_matrix),
    "gram": _Derivation(("W",), ("feature", "feature_2"), gram),
    "dimensionality": _Derivation(("W",), ("feature",), feature_dimensionality),
}


def open_trajectory(run_dir: str | Path) -> xr.Dataset:
    """Everything that a run captured, as a lazily loaded xarray Dataset.

    Scalars carry the metric names (``alignment/matched``). Arrays of the toy model: ``W`` [d_model, feature], ``U`` and
    ``V`` [d_model, rank] (singular vectors; their signs are free), ``singular_values`` [rank], ``pair/left``,
    ``pair/right``, ``pair/sigma``, ``pair/logit``, ``pair/index`` [pair], and, computed on access, ``cosine_left`` and
    ``cosine_right`` [feature, rank] (absolute), ``gram`` [feature, feature_2] (signed), ``dimensionality`` [feature].

    A row holds the weights after ``step`` updates and the losses of these weights on the draw of that step. Rows are
    sorted by step, however they came; what several devices wrote is joined. ``attrs["batch_dims"]`` names the module's
    own dimensions.

    Args:
        run_dir: A run directory (``runs/<experiment>/<run id>``). The run may still be going on.

    Returns:
        Dataset with the dimension ``step`` (the training step is its coordinate), the module's own batch dimensions
        (``instance`` for the toy model), and the named ones above.

    Raises:
        InputError: There is no trajectory, or it cannot be read.
    """
    import xarray as xr

    path = Path(run_dir)
    parts = [path] if path.suffix == ".zarr" else sorted(path.glob(_PARTS))
    parts = [part for part in parts if (part / _METADATA).is_file()]
    if not parts:
        missing = path if path.suffix == ".zarr" else path / FILE_NAME
        raise InputError(
            f"{missing} is not a trajectory. Allowed: a run directory with at least one captured row. "
            "Fix: pass the directory that `fit` or `replay` printed as its last line."
        )
    datasets = [_open_part(part) for part in parts]
    dataset = datasets[0] if len(datasets) == 1 else xr.concat(datasets, "step", data_vars="all", join="exact")
    steps = dataset["step"].values
    if (np.diff(steps) < 0).any():
        dataset = dataset.isel(step=np.argsort(steps, kind="stable"))
    derived = {
        name: _derive(dataset, derivation)
        for name, derivation in _DERIVED.items()
        if all(source in dataset for source in derivation.sources)
    }
    return dataset.assign(derived)


def trajectory_parts(run_dir: str | Path) -> list[Path]:
    """Stores of a run directory that hold a row, one for each device that wrote."""
    return sorted(part for part in Path(run_dir).glob(_PARTS) if (part / _METADATA).is_file())


def has_trajectory(run_dir: str | Path) -> bool:
    """True once a run directory holds a row, whichever device wrote it."""
    return bool(trajectory_parts(run_dir))


def _open_part(path: Path) -> xr.Dataset:
    """The rows of one writer, in the order in which they were written."""
    import xarray as xr

    try:
        raw = xr.open_zarr(path, consolidated=True, chunks=None)
        coords = {name: raw[name] for name in raw.attrs["labels"]}
        columns: dict[str, xr.DataArray] = {}
        for pack, names in raw.attrs["packs"].items():
            columns |= {name: raw[pack].isel({f"{pack}:names": i}) for i, name in enumerate(names)}
        attributes = {"batch_dims": tuple(raw.attrs.get("batch_dims", ("instance",)))}
        return xr.Dataset(columns, coords={"step": raw["step"].load(), **coords}, attrs=attributes)
    except (KeyError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}). Fix: the file is damaged; repeat the run.") from error


def _derive(dataset: xr.Dataset, derivation: _Derivation) -> xr.Variable:
    """A variable that is computed when it is indexed, from those rows of its sources alone that are asked for."""
    import xarray as xr
    from xarray.backends import BackendArray
    from xarray.core import indexing

    sources = [dataset[name].variable for name in derivation.sources]
    batch_dims = max((source.dims[:-2] for source in sources), key=len)
    sizes = {**dataset.sizes, "feature_2": dataset.sizes["feature"]}
    dims = batch_dims + derivation.dims

    class Derived(BackendArray):
        shape = tuple(sizes[d] for d in dims)
        dtype = sources[0].dtype

        def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._compute)

        def _compute(self, key: tuple[int | slice, ...]) -> np.ndarray:
            n = len(batch_dims)
            parts = []
            for source in sources:
                own = len(source.dims) - 2
                part = torch.tensor(source[key[:own]].values)
                missing = sum(isinstance(k, slice) for k in key[own:n])  # heads have dimensions that features lack
                parts.append(part.reshape(*part.shape[:-2], *(1,) * missing, *part.shape[-2:]))
            n_left = sum(isinstance(k, slice) for k in key[:n])
            rest: Any = (slice(None),) * n_left + key[n:]
            return np.asarray(derivation.compute(*parts).numpy()[rest])

    return xr.Variable(dims, indexing.LazilyIndexedArray(Derived()))


class TrajectoryStore:
    """Appends rows to a trajectory; one writer at a time.

    Args:
        run_dir: The run directory; the store is its ``trajectory.zarr``.
        rows_per_chunk: Rows of a storage chunk. Appending so that chunks fill up without a rest is fastest.
        rank: Number of the writing process, where several devices write: each has a store of its own.
    """

    def __init__(self, run_dir: str | Path, *, rows_per_chunk: int = 128, rank: int = 0) -> None:
        self.path = Path(run_dir) / (FILE_NAME if rank == 0 else f"trajectory.rank{rank}.zarr")
        self.rows_per_chunk = rows_per_chunk
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}
        self._metadata: dict[str, Any] = {}
        self._n_rows = 0

    def __len__(self) -> int:
        if self.exists:
            self._open()
        return self._n_rows

    @property
    def exists(self) -> bool:
        """True once a row was written."""
        return self._group is not None or (self.path / _METADATA).is_file()

    def append(
        self,
        columns: Mapping[str, Column],
        coords: Mapping[str, Column] | None = None,
        batch_dims: tuple[str, ...] = ("instance",),
    ) -> None:
        """Write rows and make them visible together.

        Args:
            columns: By name: (dimensions after ``step``, values [K, ...]). "step" must be among them, ascending.
                What open_trajectory derives is left out.
            coords: Labels without a step dimension; taken from the first call only.
            batch_dims: The module's own dimensions, as the probe names them; taken from the first call only.

        Raises:
            InputError: Names or shapes differ from those of the rows already there.
        """
        kept = {
            name: column
            for name, column in columns.items()
            if name not in _DERIVED or not all(source in columns for source in _DERIVED[name].sources)
        }
        steps = kept.pop("step")[1]
        packs = _pack(kept)
        if not self.exists:
            self._create(packs, kept, coords or {}, batch_dims)
        group = self._open()
        stored: Any = group.attrs["packs"]
        known = {pack: (tuple(names), self._arrays[pack].shape[2:]) for pack, names in stored.items()}
        offered = {pack: (tuple(names), kept[names[0]][1].shape[1:]) for pack, names in packs.items()}
        if known != offered:
            raise InputError(
                f"{self.path} holds other quantities than this run measures. Fix: resume with the sizes and the "
                "callbacks of the first run, or start a new run."
            )
        rows = slice(self._n_rows, self._n_rows + len(steps))
        for pack, names in packs.items():
            values = (
                np.stack([kept[name][1] for name in names], axis=1) if len(names) > 1 else kept[names[0]][1][:, None]
            )
            self._arrays[pack][rows] = values
        self._arrays["step"][rows] = steps
        self._commit(rows.stop)

    def truncate(self, before_step: int) -> None:
        """Forget the rows of ``before_step`` and later, as a run that goes on from there will write them again."""
        self._open()
        steps = self._arrays["step"][: self._n_rows]
        self._commit(int(np.searchsorted(steps, before_step)))

    def _create(
        self,
        packs: Mapping[str, list[str]],
        columns: Mapping[str, Column],
        coords: Mapping[str, Column],
        batch_dims: tuple[str, ...],
    ) -> None:
        import zarr
        from numcodecs import Blosc

        self.path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(self.path, mode="w", zarr_format=2)
        group.attrs.update(format=FORMAT, packs=dict(packs), labels=list(coords), batch_dims=batch_dims)
        layout = {
            pack: (
                (len(names), *columns[names[0]][1].shape[1:]),
                (f"{pack}:names", *columns[names[0]][0]),
                columns[names[0]][1].dtype,
            )
            for pack, names in packs.items()
        }
        for name, (shape, dims, dtype) in {**layout, "step": ((), (), np.dtype(np.int64))}.items():
            group.create_array(
                name,
                shape=(0, *shape),
                chunks=_chunk_shape(self.rows_per_chunk, shape, dtype.itemsize),
                dtype=dtype,
                order="F",  # time runs fastest inside a chunk: neighbouring steps differ little, so this packs best
                compressors=Blosc(cname="lz4", clevel=1, shuffle=Blosc.BITSHUFFLE),
                fill_value=None,
                config={"write_empty_chunks": True},  # else every chunk is first compared with the fill value
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
        self._open(group)

    def _open(self, group: zarr.Group | None = None) -> zarr.Group:
        import zarr

        if self._group is None:
            if group is None:
                group = zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
            else:
                zarr.consolidate_metadata(group.store, zarr_format=2)
            self._metadata = json.loads((self.path / _METADATA).read_text())
            self._n_rows = self._metadata["metadata"]["step/.zarray"]["shape"][0]
            self._arrays = {name: group[name] for name in (*group.attrs["packs"], "step")}  # type: ignore[misc]
            for array in self._arrays.values():
                if array.shape[0] != _CAPACITY:
                    array.resize((_CAPACITY, *array.shape[1:]))
            self._group = group
        return self._group

    def _commit(self, n_rows: int) -> None:
        """Make exactly the first rows visible."""
        for name in self._arrays:
            self._metadata["metadata"][f"{name}/.zarray"]["shape"][0] = n_rows
        write_text(self.path / _METADATA, json.dumps(self._metadata))
        self._n_rows = n_rows


def _chunk_shape(n_rows: int, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Storage chunk [rows, *shape], cut along the leading dimensions (instance, layer) until it is small enough.

    Small chunks are cheap to write, as their buffers are used again, and one instance can be read without the others.
    """
    chunk = [n_rows, *(max(1, size) for size in shape)]
    for axis in range(1, len(chunk)):
        if math.prod(chunk) * itemsize <= _CHUNK_BYTES:
            break
        chunk[axis] = 1
    return tuple(chunk)


def _pack(columns: Mapping[str, Column]) -> dict[str, list[str]]:
    """Which quantities share an array: small ones of the same dimensions, shape and type."""
    packs: dict[str, list[str]] = {}
    for name, (dims, values) in sorted(columns.items()):
        small = values[0].nbytes < _PACK_BELOW
        key = "-".join((*dims, values.dtype.str[1:])) if small else name.replace("/", "-")
        packs.setdefault(key, []).append(name)
    return packs
