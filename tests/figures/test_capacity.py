"""The figure of capacity: trained and predicted logits of every pair, as the run has them."""

import numpy as np
import pytest
from helpers.training import train

from svf_lightning.callbacks import Capacity, Capture, SVDAlignment, TrajectoryWriter
from svf_lightning.errors import InputError
from svf_lightning.figures import capacity
from svf_lightning.trajectory import open_trajectory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capacity")
    callbacks = [Capture(), SVDAlignment(), Capacity(), TrajectoryWriter()]
    train(folder, 3, callbacks, model={"template": "linear", "n_pairs": 5, "d_head": 2})
    return open_trajectory(folder)


def test_the_dots_are_the_logits_of_the_last_step_against_their_targets(run):
    data, figure = capacity.data(run), capacity(run)
    predicted, trained = figure.data
    last = run.isel(step=-1)
    np.testing.assert_allclose(trained.y, last["pair/logit"].values.ravel())
    np.testing.assert_allclose(predicted.y, last["pair/predicted_logit"].values.ravel())
    np.testing.assert_allclose(predicted.x, data.target_logit.ravel())
    assert data.target_logit.shape == (3, 5)
    assert (trained.customdata[0], trained.customdata[-1]) == ("0 → 5", "4 → 9")


def test_its_sentence_counts_the_pairs_that_get_half_of_their_target(run):
    (sentence,) = capacity.sentences(run)
    data = capacity.data(run)
    for name, values in (("served", data.logit), ("predicted", data.predicted)):
        assert sentence.evidence[name] == pytest.approx(100 * np.mean(values >= data.target_logit / 2))


def test_a_run_without_the_callback_has_no_such_figure(run):
    with pytest.raises(InputError, match="Capacity"):
        capacity(run.drop_vars("pair/predicted_logit"))
