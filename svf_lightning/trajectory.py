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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from svf_lightning.errors import DamagedError, InputError, TakenAwayError, damaged, reason
from svf_lightning.files import write_text
from svf_lightning.metrics import cosine_matrix, feature_dimensionality, gram
from svf_lightning.quantities import ATTRIBUTE, Place, Quantity, as_json, attach, stored_quantities
from svf_lightning.rows import Column, Rows
from svf_lightning.zarr_files import METADATA, read_metadata

if TYPE_CHECKING:
    import xarray as xr
    import zarr

TRAJECTORY = "trajectory.zarr"
_PARTS = "trajectory*.zarr"  # trajectory.zarr, and trajectory.rank1.zarr ... of further devices
FORMAT = 1
_MEASURED_BY = "measured_by"  # attribute: version and options of each metric callback
_DECLARED = "declared"  # attribute: names of all quantities that the run knew when it began
_PACK_BELOW = 4096  # bytes per row: quantities smaller than this share an array with their like
_CHUNK_BYTES = 4 << 20
_REMOVED = "{} was removed while the run wrote it. Nothing more is written. Fix: begin a new run."
# a chunk is written whatever is in it: one that is missing is damage, and none is compared with the fill value first
_WRITING: Any = {"write_empty_chunks": True}
_CAPACITY = 1 << 40  # rows in the arrays' own metadata; the consolidated metadata have the true number


class _Derivation(NamedTuple):
    quantity: Quantity
    sources: tuple[str, ...]
    compute: Callable[..., torch.Tensor]


_COSINE: Any = {"unit": "|cosine|", "low": 0, "high": 1, "source": "Fig. 2a", "places": Place.SLIDER}
_DERIVATIONS = (
    _Derivation(
        Quantity(
            "cosine_left", "left singular vectors", "|cos(w_i, u_k)| of every feature with every left singular vector.",
            dims=("feature", "rank"), **_COSINE,
        ),
        ("W", "U"), cosine_matrix,
    ),
    _Derivation(
        Quantity(
            "cosine_right", "right singular vectors",
            "|cos(w_i, v_k)| of every feature with every right singular vector.", dims=("feature", "rank"), **_COSINE,
        ),
        ("W", "V"), cosine_matrix,
    ),
    _Derivation(
        Quantity(
            "gram", "cosines of the features", "G = X^T X of the unit features, signed.", symbol="G", unit="cosine",
            low=-1, high=1, dims=("feature", "feature_2"), places=Place.NOWHERE, source="Fig. 1; method, section 3",
        ),
        ("W",), gram,
    ),
    _Derivation(
        Quantity(
            "dimensionality", "dimensions of a feature", "Elhage's D_i: 1/2 in an antipodal pair.", symbol="D_i",
            low=0, high=1, dims=("feature",), places=Place.NOWHERE, source="Elhage et al. 2022",
        ),
        ("W",), feature_dimensionality,
    ),
)  # fmt: skip
_DERIVED = {derivation.quantity.name: derivation for derivation in _DERIVATIONS}
DERIVED_QUANTITIES = {
    name: replace(derivation.quantity, provider="open_trajectory") for name, derivation in _DERIVED.items()
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
    parts = trajectory_parts(path)
    if not parts:
        missing = path if path.suffix == ".zarr" else path / TRAJECTORY
        raise InputError(
            f"{missing} is not a trajectory. Allowed: a run directory with at least one captured row. "
            "Fix: pass the directory that `fit` or `replay` printed as its last line."
        )
    opened = [_open_part(part) for part in parts]
    datasets = [part for part in opened if part.sizes["step"]]
    if not datasets:
        raise InputError(
            f"{parts[0]} holds no row yet. Allowed: a run directory with at least one captured row. "
            "Fix: wait until the run has captured one, or repeat it if it has ended."
        )
    try:
        dataset = datasets[0] if len(datasets) == 1 else xr.concat(datasets, "step", data_vars="all", join="exact")
        steps = dataset["step"].values
        if (np.diff(steps) < 0).any():
            dataset = dataset.isel(step=np.argsort(steps, kind="stable"))
        return attach(with_derived(dataset), {**stored_quantities(dataset), **DERIVED_QUANTITIES})
    except DamagedError:
        raise
    except Exception as error:  # parts that do not fit each other, quantities that say what none can be
        raise damaged(parts[0], error) from error


def with_derived(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset with what can be derived from it, computed when it is looked at."""
    derived = {
        name: _derive(dataset, derivation)
        for name, derivation in _DERIVED.items()
        if all(source in dataset for source in derivation.sources) and "feature" in dataset[derivation.sources[0]].dims
    }
    return dataset.assign(derived)


def derived_from(name: str) -> tuple[str, ...]:
    """Names of what a quantity is derived from when a trajectory is opened; none for one that is stored."""
    return _DERIVED[name].sources if name in _DERIVED else ()


def trajectory_parts(run_dir: str | Path) -> list[Path]:
    """Stores of a run directory (or the one store that is named), one for each device that wrote.

    Raises:
        InputError: The directory cannot be read.
    """
    path = Path(run_dir)
    try:
        parts = [path] if path.suffix == ".zarr" else sorted(path.glob(_PARTS))
        return [part for part in parts if (part / METADATA).is_file()]
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise InputError(f"{path} cannot be read ({reason(error)}). Fix: check the path and its owner.") from error


def has_trajectory(run_dir: str | Path) -> bool:
    """True once a run directory holds a row, whichever device wrote it.

    Raises:
        DamagedError: A store cannot be read.
    """
    return any(_n_rows(part) for part in trajectory_parts(run_dir))


def measured_by(part: Path) -> dict[str, Any] | None:
    """Version and options of the metrics that measured a store's rows; None if it does not say.

    Raises:
        DamagedError: The store cannot be read.
    """
    attributes = read_metadata(part).get(".zattrs", {})
    metrics: dict[str, Any] | None = attributes.get(_MEASURED_BY)
    return metrics


def _n_rows(part: Path) -> int:
    """How many rows of a store are visible."""
    try:
        return int(read_metadata(part)["step/.zarray"]["shape"][0])
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, DamagedError):
            raise
        raise damaged(part, error) from error


def _open_part(path: Path) -> xr.Dataset:
    """The rows of one writer, in the order in which they were written."""
    import xarray as xr

    from svf_lightning.zarr_backend import open_group  # imports xarray and zarr

    raw = open_group(path)
    try:
        coords = {name: raw[name] for name in raw.attrs["labels"]}
        columns: dict[str, xr.DataArray] = {}
        for pack, names in raw.attrs["packs"].items():
            columns |= {name: raw[pack].isel({f"{pack}:names": i}) for i, name in enumerate(names)}
        attributes = {"batch_dims": tuple(raw.attrs.get("batch_dims", ("instance",)))}
        if ATTRIBUTE in raw.attrs:  # version 0.1.0 wrote none
            attributes[ATTRIBUTE] = raw.attrs[ATTRIBUTE]
        return xr.Dataset(columns, coords={"step": raw["step"].load(), **coords}, attrs=attributes)
    except DamagedError:
        raise
    except Exception as error:  # what attributes of another structure raise
        raise damaged(path, error) from error


def _derive(dataset: xr.Dataset, derivation: _Derivation) -> xr.Variable:
    """A variable that is computed when it is indexed, from those rows of its sources alone that are asked for."""
    import xarray as xr
    from xarray.backends import BackendArray
    from xarray.core import indexing  # not public, but xarray's guide to backends uses it

    sources = [dataset[name].variable for name in derivation.sources]
    batch_dims = max((source.dims[:-2] for source in sources), key=len)
    sizes = {**dataset.sizes, "feature_2": dataset.sizes["feature"]}
    dims = batch_dims + derivation.quantity.dims

    class Derived(BackendArray):
        shape = tuple(sizes[d] for d in dims)
        dtype = sources[0].dtype

        def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
            return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._compute)

        def _compute(self, key: tuple[int | slice, ...]) -> np.ndarray:
            n = len(batch_dims)
            parts = []
            for source in sources:
                n_leading = len(source.dims) - 2
                part = torch.tensor(source[key[:n_leading]].values)
                missing = sum(
                    isinstance(k, slice) for k in key[n_leading:n]
                )  # heads have more dimensions than features
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
        metrics: Version and options of the metrics that measure (``run.identity.metric_identity``), to be kept.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rows_per_chunk: int = 128,
        rank: int = 0,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(run_dir) / (TRAJECTORY if rank == 0 else f"trajectory.rank{rank}.zarr")
        self.rows_per_chunk, self._metrics = rows_per_chunk, metrics
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}
        self._metadata: dict[str, Any] = {}
        self._n_rows = 0
        self._n_kept: int | None = None
        self._has_folder = self.path.parent.is_dir()
        self._left: int | None = None  # hash of the metadata as this writer left them

    def __len__(self) -> int:
        if self.exists:
            self._open()
        return self._n_rows

    @property
    def exists(self) -> bool:
        """True once a row was written."""
        return self._group is not None or (self.path / METADATA).is_file()

    def append(self, rows: Rows, include: Collection[str] | None = None) -> None:
        """Write rows and make them visible together.

        Args:
            rows: Ascending steps. Coordinates, batch dimensions and what is known of the quantities are taken from the
                first call only. What open_trajectory derives is left out.
            include: Names of the quantities to keep; None for all.

        Raises:
            InputError: Names or shapes differ from those of the rows already there, or a dimension has two sizes.
            TakenAwayError: The store was removed since the last call, or somebody else has written into it.
        """
        if self._has_folder and not self.path.parent.is_dir():  # a new one would lack what the run began with
            raise TakenAwayError(_REMOVED.format(self.path))
        with self._undisturbed():
            self._append(rows, include)

    def _append(self, rows: Rows, include: Collection[str] | None) -> None:
        kept = {
            name: column
            for name, column in rows.values.items()
            if (include is None or name in include)
            and (name not in _DERIVED or not all(source in rows.values for source in _DERIVED[name].sources))
        }
        if not self.exists:
            self._create(_pack(kept), kept, rows)
        packs: Any = self._open().attrs["packs"]
        stored = {
            name: (self._arrays[pack].shape[2:], self._arrays[pack].dtype)
            for pack, names in packs.items()
            for name in names
        }
        # an earlier version began it, which had not heard of some quantities: it goes on without them
        unheard = {name for name in kept if name not in stored and name in rows.quantities} - self._declared()
        kept = {name: column for name, column in kept.items() if name not in unheard}
        if stored != {name: (values.shape[1:], values.dtype) for name, (_, values) in kept.items()}:
            raise InputError(
                f"{self.path} holds other quantities than this run measures. Fix: resume with the sizes and the "
                "callbacks of the first run, or start a new run."
            )
        if self._n_kept is not None:  # what follows is written again; readers must not see half of it
            if self._n_kept < self._n_rows:
                self._commit(self._n_kept)
            self._n_kept = None
        steps = rows.steps
        at = slice(self._n_rows, self._n_rows + len(steps))
        for pack, names in packs.items():
            values = (
                np.stack([kept[name][1] for name in names], axis=1) if len(names) > 1 else kept[names[0]][1][:, None]
            )
            self._arrays[pack][at] = values
        self._arrays["step"][at] = steps
        self._check_as_left()  # zarr has made anew what was removed since this call began
        self._commit(at.stop)

    def go_on(self, step: int, expected: Iterable[int]) -> None:
        """Prepare to write the rows of ``step`` and later; those that are there go when the first new ones come.

        Nothing is written yet.

        Args:
            step: Training step from which the run goes on.
            expected: Steps before it that must have a row.

        Raises:
            InputError: Rows before it are missing, or the store is damaged.
        """
        self.check_metadata()
        steps = _open_part(self.path)["step"].values if self.exists else np.empty(0, dtype=np.int64)
        kept = steps[steps < step]
        missing = sorted(set(expected) - set(kept.tolist()))
        if missing or (np.diff(kept) <= 0).any():
            gap = f"{len(missing)} rows are missing, the first of step {missing[0]}" if missing else "rows are repeated"
            raise InputError(
                f"{self.path} cannot go on from step {step}: {gap}. Allowed: every row before that step. "
                f"Fix: go on from a checkpoint of step {missing[0] if missing else 0} or earlier, or in a new run "
                "directory (--run_dir)."
            )
        self._n_kept = len(kept)

    def check_metadata(self) -> None:
        """Check that a store with rows says so; one without is written anew by the first :meth:`append`.

        Raises:
            InputError: It is damaged.
        """
        if self.path.exists() and not self.exists:
            raise InputError(
                f"{self.path} is damaged: {METADATA} is missing, which says what it holds. "
                "Fix: restore that file, or begin a new run."
            )

    def _create(self, packs: Mapping[str, list[str]], columns: Mapping[str, Column], rows: Rows) -> None:
        import zarr
        from numcodecs import CRC32, Blosc

        # Zarr has one place for a compressor, the last step: Blosc is a filter, so that what it makes gets a checksum
        blosc, checksum = Blosc(cname="lz4", clevel=1, shuffle=Blosc.BITSHUFFLE), CRC32(location="end")
        _check_sizes({**columns, **{name: (dims, v[None]) for name, (dims, v) in rows.coords.items()}})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(self.path, mode="w", zarr_format=2)
        known = {name: q for name, q in rows.quantities.items() if name in columns or name in rows.coords}
        group.attrs.update(
            {ATTRIBUTE: as_json(known), **({_MEASURED_BY: self._metrics} if self._metrics is not None else {})},
            format=FORMAT,
            packs=dict(packs),
            labels=list(rows.coords),
            **{_DECLARED: sorted(rows.quantities)},
            batch_dims=rows.batch_dims,
        )
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
                filters=[blosc],
                compressors=checksum,
                fill_value=None,
                attributes={"_ARRAY_DIMENSIONS": ["step", *dims]},
            )
        for name, (dims, values) in rows.coords.items():
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                filters=[blosc],
                compressors=checksum,
                fill_value=None,
                config=_WRITING,
                attributes={"_ARRAY_DIMENSIONS": list(dims)},
            )
            array[...] = values
        self._open(group)

    def _declared(self) -> set[str]:
        """Names of the quantities that the run declared when it began, measured or not."""
        names: Any = self._open().attrs.get(_DECLARED, [])  # of before this list: whatever is missing, it had not
        return set(names)

    def _open(self, group: zarr.Group | None = None) -> zarr.Group:
        import zarr

        if self._group is None:
            if group is None:
                group = zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
            else:
                zarr.consolidate_metadata(group.store, zarr_format=2)
            text = (self.path / METADATA).read_text(encoding="utf-8")
            self._metadata, self._left = json.loads(text), hash(text)
            self._n_rows = self._metadata["metadata"]["step/.zarray"]["shape"][0]
            packs: Any = group.attrs["packs"]
            arrays: Any = {name: group[name] for name in (*packs, "step")}
            self._arrays = {name: array.with_config(_WRITING) for name, array in arrays.items()}
            for array in self._arrays.values():
                if array.shape[0] != _CAPACITY:
                    array.resize((_CAPACITY, *array.shape[1:]))
            self._group = group
        return self._group

    def _commit(self, n_rows: int) -> None:
        """Make exactly the first rows visible."""
        for name in self._arrays:
            self._metadata["metadata"][f"{name}/.zarray"]["shape"][0] = n_rows
        text = json.dumps(self._metadata)
        write_text(self.path / METADATA, text, durable=False)
        self._n_rows, self._left = n_rows, hash(text)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Check before and after a failure, whatever it is, that nobody else was here."""
        if self._left is not None:
            self._check_as_left()
        try:
            yield
        except Exception as error:
            if self._left is not None:
                self._check_as_left()
            elif isinstance(error, FileNotFoundError):  # a part of the store that was being made
                raise TakenAwayError(_REMOVED.format(self.path)) from error
            raise

    def _check_as_left(self) -> None:
        """Check that nobody else was here: what this writer adds would not be whole, or would mix with other rows."""
        try:
            text = (self.path / METADATA).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise TakenAwayError(_REMOVED.format(self.path)) from error
        if hash(text) != self._left:
            raise TakenAwayError(
                f"another process has written into {self.path} while the run wrote it. Nothing more is written. "
                "Allowed: one run at a time in a directory. Fix: begin a new run."
            )


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


def _check_sizes(columns: Mapping[str, Column]) -> None:
    """Refuse what no reader could open: a dimension that has one size in one quantity and another size in another."""
    first: dict[str, tuple[str, int]] = {}
    for name, (dims, values) in columns.items():
        for dim, size in zip(dims, values.shape[1:], strict=True):
            other, known = first.setdefault(dim, (name, size))
            if size != known:
                raise InputError(
                    f"the dimension {dim!r} has size {known} in {other!r} and {size} in {name!r}. Allowed: one size "
                    "for each name of a dimension. Fix: give the dimension of one of them another name, in the "
                    "quantity's dims."
                )


def _pack(columns: Mapping[str, Column]) -> dict[str, list[str]]:
    """Which quantities share an array: small ones of the same dimensions, shape and type."""
    packs: dict[str, list[str]] = {}
    for name, (dims, values) in sorted(columns.items()):
        small = values[0].nbytes < _PACK_BELOW
        key = "-".join((*dims, values.dtype.str[1:])) if small else name.replace("/", "-")
        packs.setdefault(key, []).append(name)
    return packs
