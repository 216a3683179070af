"""TheoryGap on heads that are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.probes import measured

from svf_lightning.callbacks import TheoryGap
from svf_lightning.errors import InputError
from svf_lightning.probe import Probe
from svf_lightning.theory import alignment_bound
from svf_lightning.toy import ToyAttentionModel, ToyData

COSINES = ("theory/left", "theory/right", "theory/omega", "alignment/unwhitened")


@pytest.mark.parametrize("kind", ["random", "tight_frame", "cone"])
def test_a_head_at_the_optimum_has_no_gap_to_the_theory(kind):
    model = ToyAttentionModel(
        n_features=14, d_model=7, n_instances=3, init_features=kind, cone_strength=0.7, init_head="optimal"
    )
    found = measured(TheoryGap(), model)
    for name in COSINES:
        torch.testing.assert_close(found[name], torch.ones(3), atol=1e-5, rtol=0)
    expected = alignment_bound(model.W.detach()).cosine.mean(-1)
    torch.testing.assert_close(found["theory/predicted_cosine"], expected)
    assert (found["theory/bound"] <= found["theory/predicted_cosine"] + 1e-6).all()


def test_a_head_aligned_with_features_of_a_cone_is_not_the_optimum():
    model = ToyAttentionModel(
        n_features=14, d_model=7, n_instances=2, init_features="cone", cone_strength=2.0, init_head="aligned"
    )
    found = measured(TheoryGap(), model)
    bound = alignment_bound(model.W.detach())
    torch.testing.assert_close(found["theory/left"], bound.cosine[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["theory/right"], bound.cosine[:, 1], atol=1e-5, rtol=0)
    assert (found["theory/cone_left"] > 0.8).all()


def test_a_random_head_is_far_from_the_theory():
    found = measured(TheoryGap(), ToyAttentionModel(n_features=60, d_model=30, n_instances=4))
    assert (found["theory/omega"].abs() < 0.5).all()


def test_the_covariance_of_many_tokens_unwhitens_as_the_exact_one_does():
    model = ToyAttentionModel(
        n_features=14, d_model=7, n_instances=2, init_features="cone", cone_strength=0.7, init_head="optimal"
    )
    data = ToyData(14, 2, batch_size=20000, feature_probability=0.3)
    model._observed = data.observed(20000)
    found = measured(TheoryGap("tokens"), model)
    assert (found["alignment/unwhitened"] > 0.995).all()
    for i, rank in enumerate(found["theory/token_rank"]):
        tokens = model.probe().keys[i].flatten(0, 1).detach().double()
        values = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2
        assert rank.item() == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
    assert "theory/token_rank" not in measured(TheoryGap(), model)


def test_random_bases_are_unwhitened_by_the_same_covariance_and_come_near_the_features_of_a_cone():
    model = ToyAttentionModel(
        n_features=14, d_model=7, n_instances=2, template="single", init_features="cone", cone_strength=1.5,
        init_head="optimal",
    )  # fmt: skip
    found = measured(TheoryGap(n_random=300, seed=1), model)["alignment/unwhitened_random"]
    plain = ToyAttentionModel(n_features=14, d_model=7, n_instances=1, init_features="tight_frame")
    assert found.min() > measured(TheoryGap(n_random=300), plain)["alignment/unwhitened_random"].max() + 0.05
    rng = np.random.default_rng(3)
    (i, j), R = model.probe().pairs[0].tolist(), model.probe().heads.W_Q.shape[-2]
    for instance in range(2):
        W = model.W.detach()[instance].double().numpy()
        cosines = []
        for _ in range(1500):
            left, right = (W @ W.T @ np.linalg.qr(rng.normal(size=(7, 7)))[0][:, :R] for _ in range(2))
            near = [
                np.abs(w @ side) / np.linalg.norm(w) / np.linalg.norm(side, axis=0)
                for w, side in ((W[:, i], left), (W[:, j], right))
            ]
            k = np.argmax(near[0] * near[1])
            cosines.append((near[0][k] + near[1][k]) / 2)
        assert found[instance].item() == pytest.approx(np.mean(cosines), abs=0.02)
    with pytest.raises(InputError, match=r"n_random.*>= 1"):
        TheoryGap(n_random=0)


def test_a_covariance_from_tokens_without_tokens_is_an_input_error():
    with pytest.raises(InputError, match="n_observed"):
        measured(TheoryGap("tokens"), ToyAttentionModel(n_features=14, d_model=7))
    with pytest.raises(InputError, match="covariance"):
        TheoryGap("guess")


@pytest.mark.parametrize("options", [{"n_heads": 2}, {"rope": True, "d_head": 6, "context_length": 3}])
def test_each_head_and_each_offset_is_compared_with_the_theory_by_itself(options):
    model = ToyAttentionModel(n_features=14, d_model=7, n_instances=2, **options)
    found = measured(TheoryGap(), model)
    assert found["theory/left"].shape == (2, *model.probe().heads.W_Q.shape[1:-2])
    assert found["theory/bound"].shape == (2,)


def test_features_that_the_head_ignores_leave_no_residual():
    model = ToyAttentionModel(n_features=6, d_model=7, init_features="orthonormal", init_head="aligned")
    assert measured(TheoryGap(), model)["theory/residual"].item() == pytest.approx(0, abs=1e-6)
    model = ToyAttentionModel(n_features=14, d_model=7, init_features="tight_frame", init_head="aligned")
    assert measured(TheoryGap(), model)["theory/residual"].item() > 0.1


def test_the_gap_is_that_to_the_dense_optimum_of_the_current_features():
    model = ToyAttentionModel(
        n_features=13, d_model=7, n_instances=2, template="linear", n_pairs=3, init_feature_norm=1.0
    ).double()
    found = measured(TheoryGap(), model)
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        omega = W_Q.T @ W_K
        T = model.template.matrix()[i].double().numpy()
        best = np.linalg.pinv(W).T @ T @ np.linalg.pinv(W)
        agreement = (omega * best).sum() / (np.linalg.norm(omega) * np.linalg.norm(best))
        assert found["theory/omega"][i].item() == pytest.approx(agreement)
        (U, _, Vt), (own_U, _, own_Vt) = np.linalg.svd(best), np.linalg.svd(omega)
        assert found["theory/left"][i].item() == pytest.approx(abs(U[:, 0] @ own_U[:, 0]))
        assert found["theory/right"][i].item() == pytest.approx(abs(Vt[0] @ own_Vt[0]))
        unit = W / np.linalg.norm(W, axis=0)
        axis = unit.mean(1) / np.linalg.norm(unit.mean(1))
        assert found["theory/cone_left"][i].item() == pytest.approx(abs(axis @ own_U[:, 0]))
        assert found["theory/cone_right"][i].item() == pytest.approx(abs(axis @ own_Vt[0]))
        assert found["theory/cone_features"][i].item() == pytest.approx(np.abs(axis @ unit[:, :6]).mean())


def test_biases_of_heads_are_left_out():
    model = ToyAttentionModel(n_features=14, d_model=7, n_instances=3)
    plain = Probe.stack([model.probe().snapshot()])
    biases = torch.randn(2, *plain.heads.W_Q.shape[:-1], generator=torch.Generator().manual_seed(0))
    biased = replace(plain, heads=replace(plain.heads, b_Q=biases[0], b_K=biases[1]))
    torch.testing.assert_close(dict(TheoryGap().measure(biased)), dict(TheoryGap().measure(plain)))


def test_without_a_head_there_is_nothing():
    assert measured(TheoryGap(), ToyAttentionModel(n_features=14, d_model=7, template="zero")) == {}


def test_its_options_are_its_arguments():
    assert TheoryGap().options() == {"covariance": "exact"}
    assert TheoryGap("tokens").options() == {"covariance": "tokens"}
