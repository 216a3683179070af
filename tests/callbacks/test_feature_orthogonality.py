"""FeatureOrthogonality against dense cosines of the features."""

import numpy as np
import pytest
import torch
from helpers.probes import measured
from helpers.training import Weights, train

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.metrics import attended_vs_rest, gram
from svf_lightning.probe import Probe
from svf_lightning.toy import ToyAttentionModel
from svf_lightning.trajectory import open_trajectory


def test_at_every_step_the_geometry_is_that_of_dense_cosines(tmp_path):
    witness = Weights()
    train(tmp_path, steps=9, callbacks=[witness, Capture(chunk=4), FeatureOrthogonality(), TrajectoryWriter()])
    dataset = open_trajectory(tmp_path).load()
    for t in (0, 5, 9):
        for i in range(3):
            W = witness.weights[t]["W"][i].double().numpy()
            unit = W / np.linalg.norm(W, axis=0)
            G = unit.T @ unit
            row = dataset.isel(step=t, instance=i)
            between, inside = np.abs(G[:2, 2:]).mean(), np.abs(G[2:, 2:])[~np.eye(9, dtype=bool)].mean()
            assert row["orthogonality/attended_vs_rest"].item() == pytest.approx(between, rel=1e-4)
            assert row["orthogonality/rest_vs_rest"].item() == pytest.approx(inside, rel=1e-4)
            interference = np.linalg.norm(G - np.eye(11), 2)
            assert row["orthogonality/interference"].item() == pytest.approx(interference, rel=1e-4)
            assert row["orthogonality/antipodal"].item() == pytest.approx(-G.min(1).mean(), rel=1e-4)
            dimensions = (W**2).sum(0) / ((unit.T @ W) ** 2).sum(1)
            assert row["orthogonality/dimensionality"].item() == pytest.approx(dimensions.mean(), rel=1e-4)
            np.testing.assert_array_equal(row["W"], witness.weights[t]["W"][i])


def test_without_a_head_there_is_geometry_and_no_alignment(tmp_path):
    callbacks = [SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter()]
    model = train(tmp_path, callbacks=callbacks, model={"template": "zero"}, data={"context_length": 0})
    dataset = open_trajectory(tmp_path)
    assert not any(str(name).startswith(("alignment", "spectrum")) for name in dataset)
    assert "orthogonality/attended_vs_rest" not in dataset
    _, rest = attended_vs_rest(gram(model.W.detach()), torch.zeros(11, dtype=torch.bool))
    np.testing.assert_allclose(dataset["orthogonality/rest_vs_rest"].values[-1], rest, rtol=1e-6)


def test_where_the_template_names_all_features_or_all_but_one_there_is_less_to_compare():
    every = measured(FeatureOrthogonality(), ToyAttentionModel(n_features=4, d_model=3, template="linear", n_pairs=2))
    assert not {"orthogonality/attended_vs_rest", "orthogonality/rest_vs_rest"} & set(every)
    but_one = measured(FeatureOrthogonality(), ToyAttentionModel(n_features=3, d_model=3))
    assert "orthogonality/attended_vs_rest" in but_one
    assert "orthogonality/rest_vs_rest" not in but_one


@pytest.mark.parametrize(("n_features", "antipodal", "dimensionality"), [(4, 1.0, 0.5), (2, 0.0, 1.0)])
def test_antipodal_pairs_share_a_dimension_and_orthogonal_features_have_one_each(n_features, antipodal, dimensionality):
    axes = torch.eye(3)[:, :2]
    features = torch.cat([axes, -axes], dim=1)[None, :, :n_features]
    found = FeatureOrthogonality().measure(Probe.stack([Probe(0, features=features)]))
    assert found["orthogonality/antipodal"].item() == pytest.approx(antipodal)
    assert found["orthogonality/dimensionality"].item() == pytest.approx(dimensionality)


def test_of_a_large_dictionary_only_the_interference_is_measured():
    features = torch.randn(3, 4097, generator=torch.Generator().manual_seed(0))
    probe = Probe(0, features=features, batch_dims=("layer", "head"), feature_dims=())
    found = FeatureOrthogonality().measure(Probe.stack([probe]))
    assert set(found) == {"orthogonality/interference"}
    unit = (features / features.norm(dim=0)).double()
    # X^T X and X X^T have their non-zero eigenvalues in common
    largest = float(torch.linalg.eigvalsh(unit @ unit.T)[-1])
    assert found["orthogonality/interference"].item() == pytest.approx(largest - 1, rel=1e-4)


def test_features_are_kept_unless_told_otherwise_and_without_features_there_is_nothing():
    model = ToyAttentionModel(n_features=11, d_model=7)
    kept, not_kept = (measured(FeatureOrthogonality(keep), model) for keep in (True, False))
    assert set(kept) - set(not_kept) == {"W"}
    assert FeatureOrthogonality().measure(Probe(0)) == {}


def test_its_options_are_its_arguments():
    assert FeatureOrthogonality().options() == {"keep_features": True}
    assert FeatureOrthogonality(False).options() == {"keep_features": False}
