import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import keep_rows

from svf_lightning.errors import DamagedError, InputError, TakenAwayError
from svf_lightning.metrics import cosine_matrix, feature_dimensionality, gram
from svf_lightning.quantities import Quantity, stored_quantities
from svf_lightning.rows import Rows
from svf_lightning.trajectory import TRAJECTORY, TrajectoryStore, has_trajectory, measured_by, open_trajectory
from svf_lightning.zarr_files import METADATA

I, D, N, R = 3, 7, 11, 5  # noqa: E741


def test_a_store_that_an_earlier_version_began_goes_on_without_what_that_had_not_heard_of(tmp_path):
    new, old = Quantity("new"), Quantity("old")
    first = Rows(np.array([0, 1]), {"old": (("instance",), np.zeros((2, 3)))}, ("instance",), quantities={"old": old})
    TrajectoryStore(tmp_path).append(first)
    more = {"old": (("instance",), np.ones((1, 3))), "new": (("instance",), np.ones((1, 3)))}
    later = Rows(np.array([2]), more, ("instance",), quantities={"old": old, "new": new})
    TrajectoryStore(tmp_path).append(later)
    stored = open_trajectory(tmp_path)
    assert stored["step"].values.tolist() == [0, 1, 2]
    assert "new" not in stored
    known = Rows(np.array([3]), {**more, "other": more["new"]}, ("instance",), quantities={"old": old})
    with pytest.raises(InputError, match="other quantities"):  # nobody has declared it
        TrajectoryStore(tmp_path).append(known)


def columns(start, stop, seed=0):
    """Columns whose values depend on the step alone, so that any two writers agree."""
    draws = [np.random.default_rng((seed, t)) for t in range(start, stop)]

    def normal(*shape):
        return np.stack([g.normal(size=shape).astype("f4") for g in draws])

    return {
        "alignment/matched": (("instance",), normal(I)),
        "loss/total": (("instance",), normal(I)),
        "W": (("instance", "d_model", "feature"), normal(I, D, N)),
        "U": (("instance", "d_model", "rank"), normal(I, D, R)),
        "V": (("instance", "d_model", "rank"), normal(I, D, R)),
        "pair/index": (("instance", "pair"), np.full((stop - start, I, 2), start, "i4")),
    }


SEEDS = np.array([4, 5, 6])
KNOWN = {
    q.name: q
    for q in (
        Quantity("alignment/matched", "alignment", "How well they align.", unit="|cosine|", low=0, high=1),
        Quantity("not/measured", "something else"),
    )
}


def rows(start, stop, seed=0):
    """The columns as rows of a run of three instances."""
    coords = {"seed": (("instance",), SEEDS)}
    return Rows(np.arange(start, stop), columns(start, stop, seed), ("instance",), coords, KNOWN)


def test_what_was_appended_is_read_back_with_its_labels(tmp_path):
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    for a, b in ((0, 8), (8, 11), (11, 16), (16, 29)):  # chunks that fill up, and chunks that do not
        store.append(rows(a, b))
    dataset = open_trajectory(tmp_path)
    expected = columns(0, 29)
    assert dataset["seed"].values.tolist() == SEEDS.tolist()
    assert dataset["step"].values.tolist() == list(range(29))
    for name in ("alignment/matched", "loss/total", "W", "U", "V"):
        assert dataset[name].dims == ("step", *expected[name][0])
        np.testing.assert_array_equal(dataset[name].values, expected[name][1])
    assert dataset["pair/index"].dtype == np.int32
    np.testing.assert_array_equal(dataset["W"].sel(step=17).isel(instance=1), expected["W"][1][17, 1])


def test_what_follows_from_the_rest_is_computed_on_access(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 6))
    dataset = open_trajectory(tmp_path)
    W, U, V = (torch.tensor(dataset[name].values) for name in "WUV")
    np.testing.assert_array_equal(dataset["gram"].values, gram(W))
    np.testing.assert_array_equal(dataset["cosine_left"].values, cosine_matrix(W, U))
    np.testing.assert_array_equal(dataset["cosine_right"].values, cosine_matrix(W, V))
    np.testing.assert_array_equal(dataset["dimensionality"].values, feature_dimensionality(W))
    part = dataset["cosine_right"].isel(step=[1, 4], instance=2, feature=slice(3, 9), rank=0)
    np.testing.assert_allclose(part.values, cosine_matrix(W, V)[[1, 4], 2, 3:9, 0], rtol=1e-6)
    assert dataset["gram"].isel(step=-1, instance=0, feature=2, feature_2=2).item() == pytest.approx(1)


def test_rows_that_are_written_again_stay_until_the_new_ones_come(tmp_path):
    TrajectoryStore(tmp_path, rows_per_chunk=8).append(rows(0, 21, seed=1))
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)  # another process
    store.go_on(13, range(13))
    assert open_trajectory(tmp_path).sizes["step"] == 21
    store.append(rows(13, 16))
    assert open_trajectory(tmp_path)["step"].values.tolist() == list(range(16))
    store.append(rows(16, 30))
    dataset = open_trajectory(tmp_path)
    assert dataset["step"].values.tolist() == list(range(30))
    np.testing.assert_array_equal(dataset["W"].values[:13], columns(0, 13, seed=1)["W"][1])
    np.testing.assert_array_equal(dataset["W"].values[13:], columns(13, 30)["W"][1])


def test_rows_that_do_not_fit_are_refused_before_the_old_ones_go(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 21))
    store = TrajectoryStore(tmp_path)
    store.go_on(13, range(13))
    with pytest.raises(InputError, match="other quantities"):
        store.append(Rows(np.arange(13, 14), {"x": ((), np.zeros(1))}, ("instance",)))
    assert open_trajectory(tmp_path).sizes["step"] == 21


def test_a_run_does_not_go_on_over_a_gap(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 10))
    with pytest.raises(InputError, match=r"step 15: 5 rows are missing, the first of step 10"):
        TrajectoryStore(tmp_path).go_on(15, range(15))
    assert open_trajectory(tmp_path).sizes["step"] == 10


def test_a_store_whose_metadata_are_gone_is_not_taken_for_an_empty_one(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 10))
    (tmp_path / "trajectory.zarr" / ".zmetadata").unlink()
    with pytest.raises(InputError, match=r"\.zmetadata is missing"):
        TrajectoryStore(tmp_path).go_on(5, range(5))


def test_a_reader_sees_whole_rows_while_the_writer_writes(tmp_path):
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    store.append(rows(0, 5))
    early = open_trajectory(tmp_path)
    store.append(rows(5, 20))
    assert early.sizes["step"] == 5
    np.testing.assert_array_equal(early["W"].values, columns(0, 5)["W"][1])
    assert open_trajectory(tmp_path).sizes["step"] == 20


def test_rows_whose_metadata_did_not_arrive_are_invisible_and_do_no_harm(tmp_path, monkeypatch):
    """The process dies between the chunks and the rename that makes them visible."""
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    store.append(rows(0, 12))
    monkeypatch.setattr(store, "_commit", lambda n: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.append(rows(12, 30, seed=9))
    assert open_trajectory(tmp_path).sizes["step"] == 12
    TrajectoryStore(tmp_path, rows_per_chunk=8).append(rows(12, 25))
    np.testing.assert_array_equal(open_trajectory(tmp_path)["W"].values, columns(0, 25)["W"][1])


WRITER = """
import os, sys; sys.path.insert(0, {tests!r})
from test_trajectory import *
for folder in {folders!r}:  # one child after the other, as the imports take seconds
    child = os.fork()
    if child == 0:
        store = TrajectoryStore(folder, rows_per_chunk=8)
        for t in range(0, 100_000, 7):
            store.append(rows(t, t + 7))
            print(folder, t, flush=True)
    print(folder, "begun", child, flush=True)
    os.waitpid(child, 0)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_and_right_rows(tmp_path):
    folders = [str(tmp_path / str(attempt)) for attempt in range(4)]
    code = WRITER.format(tests=os.path.dirname(__file__), folders=folders)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        for attempt, folder in enumerate(folders):
            child, n_written = None, 0
            while child is None or n_written < 35:
                name, *said = writer.stdout.readline().split()
                if name != folder:  # what an earlier child said before it was killed
                    continue
                if said[0] == "begun":
                    child = int(said[1])
                else:
                    n_written = int(said[0])
            time.sleep(0.013 * attempt)
            os.kill(child, signal.SIGKILL)
    for folder in folders:
        dataset = open_trajectory(folder).load()
        n = dataset.sizes["step"]
        assert n >= 35
        for name in ("W", "alignment/matched", "loss/total", "U"):
            np.testing.assert_array_equal(dataset[name].values, columns(0, n)[name][1])


def test_other_quantities_than_before_are_refused(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.append(rows(0, 3))
    fewer = {name: column for name, column in columns(3, 5).items() if name != "loss/total"}
    with pytest.raises(InputError, match="other quantities"):
        store.append(replace(rows(3, 5), values=fewer))
    assert open_trajectory(tmp_path).sizes["step"] == 3


def test_a_folder_without_a_trajectory_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(InputError, match=r"is not a trajectory.*Fix"):
        open_trajectory(tmp_path)
    TrajectoryStore(tmp_path).append(rows(0, 3))
    metadata = tmp_path / "trajectory.zarr" / ".zmetadata"
    metadata.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InputError, match="damaged"):
        open_trajectory(tmp_path)


def test_only_what_is_asked_for_is_kept(tmp_path):
    store = TrajectoryStore(tmp_path)
    for start in (0, 4):
        store.append(rows(start, start + 4), include=["W", "loss/total"])
    dataset = open_trajectory(tmp_path)
    assert {"W", "loss/total", "gram"} <= set(dataset)  # the Gram matrix follows from W
    assert not {"U", "V", "alignment/matched", "cosine_left"} & set(dataset)
    np.testing.assert_array_equal(dataset["loss/total"].values, columns(0, 8)["loss/total"][1])


def test_what_is_known_of_the_quantities_travels_with_them(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 3))
    dataset = open_trajectory(tmp_path)
    assert stored_quantities(dataset)["alignment/matched"] == KNOWN["alignment/matched"]
    assert "not/measured" not in stored_quantities(dataset)
    attributes = dataset["alignment/matched"].attrs
    assert (attributes["long_name"], attributes["units"]) == ("alignment", "|cosine|")
    assert (attributes["description"], attributes["valid_min"], attributes["valid_max"]) == (
        "How well they align.",
        0,
        1,
    )
    assert dataset["cosine_left"].attrs["units"] == "|cosine|"  # of what is derived, this package knows
    assert dataset["loss/total"].attrs == {}  # these rows say nothing of it


def test_rows_that_are_read_back_are_the_numbers_that_were_written(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 9))
    found = Rows.read(open_trajectory(tmp_path).isel(step=[2, 8]), KNOWN)
    assert found.steps.tolist() == [2, 8]
    assert found.batch_dims == ("instance",)
    assert set(found.values) == {"alignment/matched", "loss/total"}  # without further dimensions
    dims, values = found.values["loss/total"]
    assert dims == ("instance",)
    np.testing.assert_array_equal(values, columns(0, 9)["loss/total"][1][[2, 8]])
    assert found.quantity("alignment/matched").unit == "|cosine|"
    assert found.quantity("loss/total") == Quantity("loss/total")


def test_chunks_that_are_joined_are_the_rows_in_one_piece():
    joined = Rows.joined([rows(0, 4), rows(4, 5), rows(5, 11)])
    assert joined.steps.tolist() == list(range(11))
    for name, (dims, values) in columns(0, 11).items():
        if name != "pair/index":  # it holds the first step of its chunk
            assert joined.values[name][0] == dims
            np.testing.assert_array_equal(joined.values[name][1], values)
    assert joined.coords["seed"][1].tolist() == SEEDS.tolist()


def test_the_rows_of_some_instances_keep_what_is_of_no_instance():
    values = {**columns(0, 3), "shared": ((), np.arange(3.0))}
    whole = replace(rows(0, 3), values=values)
    some = whole.of_instances(slice(1, 3))
    np.testing.assert_array_equal(some.values["W"][1], values["W"][1][:, 1:])
    assert some.values["shared"][1].tolist() == [0, 1, 2]
    assert some.coords["seed"][1].tolist() == [5, 6]


def test_a_logger_gets_every_nth_row_and_the_last_one_as_each_quantity_says():
    known = {
        "alignment/matched": Quantity("alignment/matched"),
        "loss/total": Quantity("loss/total", logged="mean"),
        "detail": Quantity("detail", logged="no"),
    }
    values = {**columns(0, 8), "detail": (("instance",), np.zeros((8, I)))}
    logged = replace(rows(0, 8), values=values, quantities=known).to_log(every=3, last=7)
    assert [step for step, _ in logged] == [0, 3, 6, 7]
    matched = values["alignment/matched"][1]
    for step, metrics in logged:
        assert set(metrics) == {"alignment/matched", "alignment/matched/min", "alignment/matched/max", "loss/total"}
        assert metrics["alignment/matched"] == pytest.approx(matched[step].mean())
        assert metrics["alignment/matched/min"] == pytest.approx(matched[step].min())
        assert metrics["alignment/matched/max"] == pytest.approx(matched[step].max())


def test_a_dimension_with_two_sizes_is_refused_before_anything_is_written(tmp_path):
    values = {"a": (("pair",), np.zeros((2, 3))), "mine": (("pair",), np.zeros((2, 5)))}
    with pytest.raises(InputError, match=r"'pair' has size 3 in 'a' and 5 in 'mine'.*Fix: "):
        TrajectoryStore(tmp_path).append(Rows(np.arange(2), values, ()))
    assert list(tmp_path.iterdir()) == []
    coords = {"name": (("pair",), np.array(["x", "y"]))}
    with pytest.raises(InputError, match="'pair' has size 3 in 'a' and 2 in 'name'"):
        TrajectoryStore(tmp_path).append(Rows(np.arange(2), {"a": values["a"]}, (), coords))


def test_a_store_goes_on_under_the_names_of_dimensions_that_it_has(tmp_path):
    """Names of dimensions may change between versions; the numbers belong to the same quantity."""
    for steps, dim in ((np.arange(2), "old"), (np.arange(2, 5), "new")):
        values = np.arange(3 * len(steps), dtype="f4").reshape(-1, 3)
        TrajectoryStore(tmp_path).append(Rows(steps, {"a": ((dim,), values)}, ()))
    stored = open_trajectory(tmp_path)["a"]
    assert stored.dims == ("step", "old")
    assert stored.shape == (5, 3)


def test_the_store_says_how_its_rows_were_measured(tmp_path):
    metrics = {"Mine": {"version": 1, "power": 2.0}}
    TrajectoryStore(tmp_path, metrics=metrics).append(rows(0, 2))
    assert measured_by(tmp_path / "trajectory.zarr") == metrics
    TrajectoryStore(tmp_path / "other").append(rows(0, 2))
    assert measured_by(tmp_path / "other" / "trajectory.zarr") is None


def test_a_store_without_a_row_is_no_trajectory_yet(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.append(rows(0, 3))
    keep_rows(tmp_path, 0)
    assert not has_trajectory(tmp_path)
    with pytest.raises(InputError, match=r"holds no row yet.*Fix: wait"):
        open_trajectory(tmp_path)
    TrajectoryStore(tmp_path).append(rows(0, 2))
    assert open_trajectory(tmp_path).sizes["step"] == 2


def test_metadata_that_contradict_each_other_are_noticed(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 3))
    path = tmp_path / TRAJECTORY / ".zattrs"
    path.write_text(path.read_text().replace("alignment", "agreement", 1))
    with pytest.raises(DamagedError, match="contradict each other"):
        open_trajectory(tmp_path)


@pytest.mark.parametrize("damage", ["a flipped bit", "an end that is missing", "a file that is missing"])
@pytest.mark.parametrize("name", ["alignment/matched", "W", "pair/index", "step", "seed"])
def test_a_damaged_chunk_is_noticed_when_it_is_read(tmp_path, name, damage):
    store = TrajectoryStore(tmp_path)
    # the first rows of pair/index are zeros, which zarr leaves out unless it is told otherwise
    store.append(rows(0, 3))
    packs = json.loads((store.path / ".zattrs").read_text())["packs"]
    array = next((pack for pack, names in packs.items() if name in names), name)
    path = sorted((tmp_path / TRAJECTORY / array).glob("0*"))[-1]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    if damage == "a file that is missing":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "a flipped bit" else raw[:-1])
    with pytest.raises(DamagedError, match="checksum" if damage != "a file that is missing" else "a chunk is missing"):
        open_trajectory(tmp_path).load()


def test_a_store_of_before_without_checksums_is_read_and_goes_on(tmp_path, monkeypatch):
    import numcodecs
    import zarr

    create = zarr.Group.create_array

    def of_before(group, name, *, filters=None, compressors="auto", config=None, **options):
        compressors = filters[0] if options.get("order") == "F" else "auto"
        return create(group, name, compressors=compressors, **options)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Group, "create_array", of_before)
        TrajectoryStore(tmp_path).append(rows(0, 5))
    codec = zarr.open_group(tmp_path / TRAJECTORY, mode="r", zarr_format=2)["step"].compressors
    assert isinstance(codec[0], numcodecs.Blosc)
    TrajectoryStore(tmp_path).append(rows(5, 9))
    trajectory = open_trajectory(tmp_path).load()
    for name, (_, values) in columns(0, 5).items():
        np.testing.assert_array_equal(trajectory[name], np.concatenate([values, columns(5, 9)[name][1]]))
    for path in (tmp_path / TRAJECTORY).glob("*-*/0*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="a chunk is not as long as it was"):
        open_trajectory(tmp_path).load()


@pytest.mark.parametrize("taken", ["the run directory", "the metadata"])
def test_a_writer_whose_store_was_removed_writes_nothing_more(tmp_path, taken):
    run_dir = tmp_path / "run"
    store = TrajectoryStore(run_dir)
    store.append(rows(0, 4))
    if taken == "the run directory":
        shutil.rmtree(run_dir)
    else:
        (store.path / METADATA).unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TakenAwayError, match="was removed while the run wrote it"):
        store.append(rows(4, 8))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_writer_notices_that_another_one_has_written(tmp_path):
    first, second = TrajectoryStore(tmp_path), TrajectoryStore(tmp_path)
    first.append(rows(0, 4))
    second.append(rows(4, 8))
    there = open_trajectory(tmp_path).load()
    with pytest.raises(TakenAwayError, match="another process has written into"):
        first.append(rows(4, 8, seed=1))
    assert open_trajectory(tmp_path).load().equals(there)
