import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from svf_lightning.errors import InputError
from svf_lightning.metrics import cosine_matrix, feature_dimensionality, gram
from svf_lightning.trajectory import TrajectoryStore, open_trajectory

I, D, N, R = 3, 7, 11, 5  # noqa: E741


def rows(start, stop, seed=0):
    """Columns whose values depend on the step alone, so that any two writers agree."""
    draws = [np.random.default_rng((seed, t)) for t in range(start, stop)]

    def normal(*shape):
        return np.stack([g.normal(size=shape).astype("f4") for g in draws])

    return {
        "step": ((), np.arange(start, stop)),
        "alignment/matched": (("instance",), normal(I)),
        "loss/total": (("instance",), normal(I)),
        "W": (("instance", "d_model", "feature"), normal(I, D, N)),
        "U": (("instance", "d_model", "rank"), normal(I, D, R)),
        "V": (("instance", "d_model", "rank"), normal(I, D, R)),
        "pair/index": (("instance", "pair"), np.full((stop - start, I, 2), start, "i4")),
    }


COORDS = {"seed": (("instance",), np.array([4, 5, 6]))}


def test_what_was_appended_is_read_back_with_its_labels(tmp_path):
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    for a, b in ((0, 8), (8, 11), (11, 16), (16, 29)):  # chunks that fill up, and chunks that do not
        store.append(rows(a, b), COORDS)
    dataset = open_trajectory(tmp_path)
    expected = rows(0, 29)
    assert dataset["seed"].values.tolist() == [4, 5, 6]
    assert dataset["step"].values.tolist() == list(range(29))
    for name in ("alignment/matched", "loss/total", "W", "U", "V"):
        assert dataset[name].dims == ("step", *expected[name][0])
        np.testing.assert_array_equal(dataset[name].values, expected[name][1])
    assert dataset["pair/index"].dtype == np.int32
    np.testing.assert_array_equal(dataset["W"].sel(step=17).isel(instance=1), expected["W"][1][17, 1])


def test_what_follows_from_the_rest_is_computed_on_access(tmp_path):
    TrajectoryStore(tmp_path).append(rows(0, 6), COORDS)
    dataset = open_trajectory(tmp_path)
    W, U, V = (torch.tensor(dataset[name].values) for name in "WUV")
    np.testing.assert_array_equal(dataset["gram"].values, gram(W))
    np.testing.assert_array_equal(dataset["cosine_left"].values, cosine_matrix(W, U))
    np.testing.assert_array_equal(dataset["cosine_right"].values, cosine_matrix(W, V))
    np.testing.assert_array_equal(dataset["dimensionality"].values, feature_dimensionality(W))
    part = dataset["cosine_right"].isel(step=[1, 4], instance=2, feature=slice(3, 9), rank=0)
    np.testing.assert_allclose(part.values, cosine_matrix(W, V)[[1, 4], 2, 3:9, 0], rtol=1e-6)
    assert dataset["gram"].isel(step=-1, instance=0, feature=2, feature_2=2).item() == pytest.approx(1)


def test_rows_from_a_step_on_can_be_forgotten_and_written_again(tmp_path):
    TrajectoryStore(tmp_path, rows_per_chunk=8).append(rows(0, 21, seed=1), COORDS)
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)  # another process
    store.truncate(before_step=13)
    assert open_trajectory(tmp_path).sizes["step"] == 13
    store.append(rows(13, 30), COORDS)
    dataset = open_trajectory(tmp_path)
    assert dataset["step"].values.tolist() == list(range(30))
    np.testing.assert_array_equal(dataset["W"].values[:13], rows(0, 13, seed=1)["W"][1])
    np.testing.assert_array_equal(dataset["W"].values[13:], rows(13, 30)["W"][1])


def test_a_reader_sees_whole_rows_while_the_writer_writes(tmp_path):
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    store.append(rows(0, 5), COORDS)
    early = open_trajectory(tmp_path)
    store.append(rows(5, 20), COORDS)
    assert early.sizes["step"] == 5
    np.testing.assert_array_equal(early["W"].values, rows(0, 5)["W"][1])
    assert open_trajectory(tmp_path).sizes["step"] == 20


def test_rows_whose_metadata_did_not_arrive_are_invisible_and_do_no_harm(tmp_path, monkeypatch):
    """The process dies between the chunks and the rename that makes them visible."""
    store = TrajectoryStore(tmp_path, rows_per_chunk=8)
    store.append(rows(0, 12), COORDS)
    monkeypatch.setattr(store, "_commit", lambda n: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.append(rows(12, 30, seed=9), COORDS)
    assert open_trajectory(tmp_path).sizes["step"] == 12
    TrajectoryStore(tmp_path, rows_per_chunk=8).append(rows(12, 25), COORDS)
    np.testing.assert_array_equal(open_trajectory(tmp_path)["W"].values, rows(0, 25)["W"][1])


WRITER = """
import sys; sys.path.insert(0, {tests!r})
from test_trajectory import *
store = TrajectoryStore({folder!r}, rows_per_chunk=8)
for t in range(0, 100_000, 7):
    store.append(rows(t, t + 7), COORDS)
    print(t, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_and_right_rows(tmp_path):
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        code = WRITER.format(tests=os.path.dirname(__file__), folder=str(folder))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
            while int(writer.stdout.readline()) < 35:
                pass
            time.sleep(0.013 * attempt)
            writer.send_signal(signal.SIGKILL)
        dataset = open_trajectory(folder).load()
        n = dataset.sizes["step"]
        assert n >= 35
        for name in ("W", "alignment/matched", "loss/total", "U"):
            np.testing.assert_array_equal(dataset[name].values, rows(0, n)[name][1])


def test_other_quantities_than_before_are_refused(tmp_path):
    store = TrajectoryStore(tmp_path)
    store.append(rows(0, 3), COORDS)
    fewer = {name: column for name, column in rows(3, 5).items() if name != "loss/total"}
    with pytest.raises(InputError, match="other quantities"):
        store.append(fewer, COORDS)
    assert open_trajectory(tmp_path).sizes["step"] == 3


def test_a_folder_without_a_trajectory_and_a_damaged_one_are_named(tmp_path):
    with pytest.raises(InputError, match=r"is not a trajectory.*Fix"):
        open_trajectory(tmp_path)
    TrajectoryStore(tmp_path).append(rows(0, 3), COORDS)
    metadata = tmp_path / "trajectory.zarr" / ".zmetadata"
    metadata.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(InputError, match="damaged"):
        open_trajectory(tmp_path)
