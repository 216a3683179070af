"""TrajectoryWriter: where rows go, which of them are kept, and what it does not write over."""

import lightning.pytorch as pl
import numpy as np
import pytest
from helpers.training import train

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.errors import InputError
from svf_lightning.trajectory import has_trajectory, open_trajectory


def callbacks(chunk=128, **options):
    return [Capture(chunk=chunk), SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter(**options)]


def test_rows_are_there_to_read_chunk_by_chunk_while_the_run_goes_on(tmp_path):
    seen = {}

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen[trainer.global_step] = open_trajectory(tmp_path).sizes["step"] if has_trajectory(tmp_path) else 0

    train(tmp_path, steps=10, callbacks=[*callbacks(chunk=4), Reader()])
    assert [seen[step] for step in range(10)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert open_trajectory(tmp_path)["step"].values.tolist() == list(range(11))


def test_only_the_named_quantities_are_kept(tmp_path):
    train(tmp_path, callbacks=callbacks(include=["W", "alignment/matched"]))
    dataset = open_trajectory(tmp_path)
    assert {"W", "alignment/matched"} <= set(dataset)
    assert set(dataset) - {"W", "alignment/matched"} == {"gram", "dimensionality"}  # they follow from W


def test_another_directory_than_the_runs_can_be_named(tmp_path):
    train(tmp_path / "run", callbacks=callbacks(run_dir=str(tmp_path / "elsewhere")))
    assert has_trajectory(tmp_path / "elsewhere")
    assert not has_trajectory(tmp_path / "run")


def test_a_second_training_does_not_write_over_the_first(tmp_path):
    train(tmp_path, callbacks=callbacks())
    before = open_trajectory(tmp_path).load()
    with pytest.raises(InputError, match="already holds"):
        train(tmp_path, callbacks=callbacks(), model={"seed": 5})
    assert before.equals(open_trajectory(tmp_path).load())


def test_rows_are_added_where_that_is_asked_for(tmp_path):
    train(tmp_path, steps=3, callbacks=callbacks())
    train(tmp_path, steps=3, callbacks=callbacks(add=True), model={"seed": 5})
    dataset = open_trajectory(tmp_path)
    assert dataset["step"].values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    train(tmp_path / "other", steps=3, callbacks=callbacks(), model={"seed": 5})
    np.testing.assert_array_equal(dataset["W"].values[1::2], open_trajectory(tmp_path / "other")["W"].values)


def test_a_run_that_resumes_writes_the_rows_of_its_step_and_later_again(tmp_path):
    saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = {"enable_checkpointing": True}
    train(tmp_path, steps=9, callbacks=[*callbacks(), saved], trainer=trainer)
    before = open_trajectory(tmp_path).load()
    train(
        tmp_path, steps=6, callbacks=callbacks(), data={"seed": 9}, weights_only=True,
        ckpt_path=str(tmp_path / "step=4.ckpt"),
    )  # fmt: skip
    after = open_trajectory(tmp_path)
    assert after["step"].values.tolist() == list(range(7))
    np.testing.assert_array_equal(after["W"].values[:5], before["W"].values[:5])
    assert (after["W"].values[5:] != before["W"].values[5:7]).any(axis=(1, 2, 3)).all()  # from other draws


def test_a_run_that_resumes_with_other_options_of_a_metric_is_refused_and_keeps_its_rows(tmp_path):
    saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = {"enable_checkpointing": True}
    train(tmp_path, steps=6, callbacks=[SVDAlignment(), TrajectoryWriter(), saved], trainer=trainer)
    before = open_trajectory(tmp_path).load()
    with pytest.raises(InputError, match=r"SVDAlignment\.significant=0\.05, and this call has 0\.5"):
        train(
            tmp_path, steps=9, callbacks=[SVDAlignment(significant=0.5), TrajectoryWriter()], weights_only=True,
            ckpt_path=str(tmp_path / "step=4.ckpt"),
        )  # fmt: skip
    assert before.equals(open_trajectory(tmp_path).load())
