"""SVDAlignment against dense decompositions of the heads."""

import numpy as np
import pytest
import torch
from helpers.probes import measured
from helpers.training import Weights, train
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from svf_lightning.callbacks import Capture, FeatureOrthogonality, SVDAlignment, TrajectoryWriter
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics.dynamics import alignment_by_chance
from svf_lightning.probe import Probe
from svf_lightning.toy import ToyAttentionModel
from svf_lightning.trajectory import open_trajectory


def decomposed(model, instance):
    """Unit features, singular vectors and singular values of one instance, in float64."""
    W, W_Q, W_K = (p.detach()[instance].double().numpy() for p in (model.W, model.W_Q, model.W_K))
    U, S, Vt = np.linalg.svd(W_Q.T @ W_K)
    rank = min(W_Q.shape)
    return W / np.linalg.norm(W, axis=0), U[:, :rank], S[:rank], Vt[:rank].T


def several_pairs(**options):
    settings = {"template": "linear", "n_pairs": 4, "target_logit": [2.0, 5.0, 9.0], "init_feature_norm": 1.0}
    return ToyAttentionModel(n_features=13, d_model=7, n_instances=3, **settings, **options).double()


def test_at_every_step_spectrum_and_alignment_are_those_of_a_dense_decomposition(tmp_path):
    witness = Weights()
    metrics = [SVDAlignment(), FeatureOrthogonality()]  # the latter keeps W, from which cosines are computed
    train(tmp_path, steps=9, callbacks=[witness, Capture(chunk=4), *metrics, TrajectoryWriter()])
    dataset = open_trajectory(tmp_path).load()
    for t in (0, 5, 9):
        for i in range(3):
            w = {k: v[i].double().numpy() for k, v in witness.weights[t].items()}
            U, S, Vt = np.linalg.svd(w["W_Q"].T @ w["W_K"])
            unit = w["W"] / np.linalg.norm(w["W"], axis=0)
            left, right = np.abs(unit.T @ U), np.abs(unit.T @ Vt.T)
            k = (left[0] * right[1]).argmax()
            row = dataset.isel(step=t, instance=i)
            np.testing.assert_allclose(row["singular_values"], S, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(row["cosine_left"], left, atol=2e-3)
            np.testing.assert_allclose(row["cosine_right"], right, atol=2e-3)
            assert row["spectrum/sigma_1"].item() == pytest.approx(S[0], rel=1e-4)
            assert row["spectrum/sigma_2"].item() == pytest.approx(S[1], rel=1e-4)
            assert row["spectrum/sigma_ratio"].item() == pytest.approx(S[1] / S[0], rel=1e-4)
            assert row["spectrum/stable_rank"].item() == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-4)
            assert row["pair/index"].item() == k
            assert row["alignment/left"].item() == pytest.approx(left[0, k], abs=1e-3)
            assert row["alignment/right"].item() == pytest.approx(right[1, k], abs=1e-3)
            assert row["alignment/matched"].item() == pytest.approx((left[0, k] + right[1, k]) / 2, abs=1e-3)


def test_several_pairs_are_assigned_to_singular_pairs_as_scipy_assigns_them():
    model = several_pairs()
    found = measured(SVDAlignment(), model)
    for i in range(3):
        unit, U, S, V = decomposed(model, i)
        left, right = np.abs(unit[:, :4].T @ U), np.abs(unit[:, 4:8].T @ V)
        pairs, at = linear_sum_assignment(left * right, maximize=True)
        assert found["pair/index"][i].tolist() == at.tolist()
        np.testing.assert_allclose(found["pair/left"][i], left[pairs, at], atol=1e-9)
        np.testing.assert_allclose(found["pair/right"][i], right[pairs, at], atol=1e-9)
        np.testing.assert_allclose(found["pair/sigma"][i], S[at], rtol=1e-9)
        both = (left[pairs, at] + right[pairs, at]) / 2
        assert found["alignment/matched"][i].item() == pytest.approx(both.mean())
        assert found["alignment/matched_min"][i].item() == pytest.approx(both.min())
        targets = model.template.logits[i].numpy()
        expected = spearmanr(S[at], targets).statistic
        assert found["spectrum/target_spearman"][i].item() == pytest.approx(expected)


def test_the_logit_of_a_pair_is_the_bilinear_form_of_its_features_and_is_compared_with_the_target():
    model = several_pairs()
    found = measured(SVDAlignment(), model)
    for i in range(3):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        logits = np.array([W[:, p] @ W_Q.T @ W_K @ W[:, p + 4] for p in range(4)])
        np.testing.assert_allclose(found["pair/logit"][i], logits, rtol=1e-9)
        targets = model.template.logits[i].numpy()
        fidelity = 1 - np.abs(logits - targets).mean() / np.abs(targets).mean()
        assert found["alignment/logit_fidelity"][i].item() == pytest.approx(fidelity, rel=1e-6)


@pytest.mark.parametrize("gap", [0.0, 0.3, 0.99])
def test_the_subspace_is_spanned_by_the_vectors_of_near_equal_singular_values(gap):
    model = several_pairs()
    found = measured(SVDAlignment(relative_gap=gap), model)
    for i in range(3):
        unit, U, S, V = decomposed(model, i)
        lengths = []
        for pair, k in enumerate(found["pair/index"][i].tolist()):
            near = np.abs(S - S[k]) <= gap * S[k] + 1e-12
            for side, vectors, feature in ((0, U, pair), (1, V, pair + 4)):
                projection = vectors[:, near] @ vectors[:, near].T @ unit[:, feature]
                lengths.append((side, np.linalg.norm(projection)))
        assert found["alignment/subspace"][i].item() == pytest.approx(np.mean([x for _, x in lengths]))


def test_scores_of_pairs_are_those_of_the_dense_head():
    """Angle, sine, sign and partner, and the line through singular values and target logits."""
    model = several_pairs()
    found = measured(SVDAlignment(relative_gap=0.0), model)
    for i in range(3):
        unit, U, S, V = decomposed(model, i)
        at = found["pair/index"][i].tolist()
        left, right = (
            np.array([unit[:, p + 4 * side] @ v[:, k] for p, k in enumerate(at)]) for side, v in ((0, U), (1, V))
        )
        both = np.abs([left, right])
        assert found["alignment/angle"][i].item() == pytest.approx(np.degrees(np.arccos(both)).mean())
        assert found["alignment/sine"][i].item() == pytest.approx(np.sin(np.arccos(both)).mean())
        assert found["alignment/paired"][i].item() == pytest.approx((left * right).mean())
        assert found["alignment/paired_min"][i].item() == pytest.approx((left * right).min())
        chance = alignment_by_chance(7, 7, 4).matched.mean
        assert found["alignment/above_chance"][i].item() == pytest.approx((both.mean() - chance) / (1 - chance))
        slope, intercept = np.polyfit(model.template.logits[i].numpy(), S[at], 1)
        assert found["spectrum/target_slope"][i].item() == pytest.approx(slope)
        assert found["spectrum/target_intercept"][i].item() == pytest.approx(intercept)


@pytest.mark.parametrize("target", [5.0, -5.0])
def test_a_head_that_gives_the_target_logit_scores_1_whatever_its_sign_and_one_of_the_other_sign_does_not(target):
    settings = {"template": "single", "target_logit": target, "init_features": "orthonormal", "init_feature_norm": 1.0}
    model = ToyAttentionModel(n_features=6, d_model=6, n_instances=1, init_head="aligned", **settings).double()
    found = measured(SVDAlignment(), model)
    assert found["alignment/paired"].item() == pytest.approx(1)
    assert found["alignment/served"].item() == 1
    with torch.no_grad():
        model.W_Q.neg_()
    other = measured(SVDAlignment(), model)
    assert other["alignment/matched"].item() == pytest.approx(1)  # blind to it
    assert other["alignment/paired"].item() == pytest.approx(-1)
    assert other["alignment/served"].item() == 0


def test_with_fewer_features_than_dimensions_the_noise_outside_their_span_is_left_out():
    settings = {"n_features": 4, "d_model": 9, "n_instances": 2, "init_features": "orthonormal", "init_head": "aligned"}
    model = ToyAttentionModel(**settings).double()
    noise = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        W = model.W
        outside = torch.eye(9, dtype=torch.float64) - W @ torch.linalg.pinv(W)
        model.W_K.add_(noise @ outside)  # no feature sees it
    found = measured(SVDAlignment(), model)
    for i in range(2):
        Q = np.linalg.qr(model.W[i].detach().numpy())[0]
        S = np.linalg.svd(Q.T @ (model.W_Q[i].T @ model.W_K[i]).detach().numpy() @ Q)[1]
        assert found["spectrum/sigma_ratio_in_span"][i].item() == pytest.approx(S[1] / S[0], abs=1e-9)
        assert found["spectrum/n_significant_in_span"][i].item() == 1
        assert found["alignment/matched_in_span"][i].item() == pytest.approx(1)
    assert (found["alignment/matched"] < 0.99).all()
    assert "alignment/matched_in_span" not in measured(SVDAlignment(), several_pairs())


@pytest.mark.parametrize("significant", [0.0, 0.05, 0.5])
def test_singular_values_above_a_fraction_of_the_largest_are_counted(significant):
    model = several_pairs(d_head=5)
    found = measured(SVDAlignment(significant=significant), model)
    for i in range(3):
        _, _, S, _ = decomposed(model, i)
        assert found["spectrum/n_significant"][i].item() == (significant * S[0] < S).sum()
    assert significant != 0.5 or (found["spectrum/n_significant"] < 5).any()


def test_every_target_pair_may_be_left_unmatched_but_never_matched_twice():
    """More pairs than singular vectors: the rest counts as not aligned."""
    pairs = [(i, i + 4, 2.0) for i in range(4)]
    settings = {"template": pairs, "target_logit": None, "d_head": 2, "n_instances": 1}
    found = measured(SVDAlignment(), ToyAttentionModel(n_features=11, d_model=7, **settings))
    assert sorted(found["pair/index"].flatten().tolist()) == [-1, -1, 0, 1]


def test_singular_vectors_are_kept_unless_told_otherwise():
    model = several_pairs(d_head=5)
    with_vectors, without = (measured(SVDAlignment(keep_vectors=keep), model) for keep in (True, False))
    assert set(with_vectors) - set(without) == {"U", "V"}
    for i in range(3):
        omega = with_vectors["U"][i] * with_vectors["singular_values"][i] @ with_vectors["V"][i].T
        torch.testing.assert_close(omega, (model.W_Q[i].T @ model.W_K[i]).detach())


def test_without_features_there_is_a_spectrum_and_without_heads_there_is_nothing():
    heads = AttentionHeads(*torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)))
    spectrum = SVDAlignment().measure(Probe.stack([Probe(0, heads)]))
    assert "spectrum/sigma_1" in spectrum
    assert all(name.startswith("spectrum/") or name == "singular_values" for name in spectrum)
    features = torch.randn(3, 7, 11)
    alone = SVDAlignment().measure(Probe.stack([Probe(0, heads, features)]))
    assert set(alone) == {*spectrum, "U", "V"}  # no pair to look for
    assert SVDAlignment().measure(Probe.stack([Probe(0, features=features)])) == {}


def test_a_head_of_rank_one_has_no_second_singular_value():
    found = measured(SVDAlignment(), several_pairs(d_head=1))
    assert "spectrum/sigma_2" not in found
    assert found["spectrum/sigma_ratio"].tolist() == [0, 0, 0]
    assert found["spectrum/stable_rank"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{"relative_gap": 1.0}, {"relative_gap": -0.1}, {"significant": 1.5}])
def test_an_option_out_of_range_is_an_input_error(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=.*fraction"):
        SVDAlignment(**options)


def test_its_options_are_its_arguments():
    assert SVDAlignment().options() == {"relative_gap": 0.1, "significant": 0.05, "keep_vectors": True}
    assert SVDAlignment(0.2, keep_vectors=False).options() == {
        "relative_gap": 0.2, "significant": 0.05, "keep_vectors": False,
    }  # fmt: skip
