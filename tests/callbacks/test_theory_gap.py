"""TheoryGap, PairSharing and HeadSharing on heads that are known."""

import pytest
import torch

from svf_lightning.callbacks import HeadSharing, Measured, PairSharing, SVDAlignment, TheoryGap
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.theory import alignment_bound
from svf_lightning.toy import ToyAttentionModel, ToyData

COSINES = ("theory/left", "theory/right", "theory/omega", "alignment/unwhitened")


def measured(callback, model):
    found = callback.measure(Probe.stack([model.probe().snapshot()]))
    return {name: (value.values if isinstance(value, Measured) else value)[0] for name, value in found.items()}


@pytest.mark.parametrize("kind", ["random", "tight_frame", "cone"])
def test_a_head_at_the_optimum_has_no_gap_to_the_theory(kind):
    model = ToyAttentionModel(14, 7, n_instances=3, init_features=kind, cone_strength=0.7, init_head="optimal")
    found = measured(TheoryGap(), model)
    for name in COSINES:
        torch.testing.assert_close(found[name], torch.ones(3), atol=1e-5, rtol=0)
    expected = alignment_bound(model.W.detach()).cosine.mean(-1)
    torch.testing.assert_close(found["theory/predicted_cosine"], expected)
    assert (found["theory/bound"] <= found["theory/predicted_cosine"] + 1e-6).all()


def test_a_head_aligned_with_features_of_a_cone_is_not_the_optimum():
    model = ToyAttentionModel(14, 7, n_instances=2, init_features="cone", cone_strength=2.0, init_head="aligned")
    found = measured(TheoryGap(), model)
    bound = alignment_bound(model.W.detach())
    torch.testing.assert_close(found["theory/left"], bound.cosine[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["theory/right"], bound.cosine[:, 1], atol=1e-5, rtol=0)
    assert (found["theory/cone_left"] > 0.8).all()


def test_a_random_head_is_far_from_the_theory():
    found = measured(TheoryGap(), ToyAttentionModel(60, 30, n_instances=4))
    assert (found["theory/omega"].abs() < 0.5).all()


def test_the_covariance_of_many_tokens_unwhitens_as_the_exact_one_does():
    model = ToyAttentionModel(14, 7, n_instances=2, init_features="cone", cone_strength=0.7, init_head="optimal")
    data = ToyData(14, 2, batch_size=20000, feature_probability=0.3)
    model._observed = data.observed(20000)
    found = measured(TheoryGap("tokens"), model)
    assert (found["alignment/unwhitened"] > 0.995).all()


def test_a_covariance_from_tokens_without_tokens_is_an_input_error():
    with pytest.raises(InputError, match="n_observed"):
        measured(TheoryGap("tokens"), ToyAttentionModel(14, 7))
    with pytest.raises(InputError, match="covariance"):
        TheoryGap("guess")


def probe_of(W_Q, W_K, features, pairs, **options):
    pairs = torch.tensor(pairs)
    logits = torch.ones(*W_Q.shape[:-2], len(pairs))
    return Probe.stack([Probe(0, AttentionHeads(W_Q, W_K), features, pairs, logits, **options)])


def test_pairs_with_a_singular_pair_of_their_own_are_counted_as_aligned():
    eye = torch.eye(4)[None]
    omega = torch.zeros(1, 4, 4)
    omega[0, 0, 2], omega[0, 1, 3] = 3.0, 2.0
    found = PairSharing().measure(probe_of(eye, omega, eye, [(0, 2), (1, 3)]))
    assert found["sharing/n_aligned"].item() == 2
    assert found["sharing/n_shared"].item() == 0
    torch.testing.assert_close(found["pair/best"].values, torch.ones(1, 1, 2))
    assert found["pair/best_index"].values.flatten().tolist() == [0, 1]


def test_pairs_on_one_singular_vector_share_it():
    eye = torch.eye(4)[None]
    omega = torch.zeros(1, 4, 4)
    omega[0, 0, 3] = omega[0, 1, 3] = 3.0  # features 0 and 1 both attend to 3: rank one
    found = PairSharing().measure(probe_of(eye, omega, eye, [(0, 3), (1, 3)]))
    assert found["sharing/n_shared"].item() == 1
    assert found["sharing/n_aligned"].item() == 0
    torch.testing.assert_close(found["sharing/best"], torch.full((1, 1), (0.5**0.5 + 1) / 2))


def shared(W_K):
    """HeadSharing of heads Omega_h = W_K[h] [head, 4, 4] with the pairs (0, 2) and (1, 3) of orthonormal features."""
    eye = torch.eye(4)
    probe = probe_of(
        eye.expand_as(W_K[None]), W_K[None], eye[None], [(0, 2), (1, 3)],
        batch_dims=("instance", "head"), feature_dims=("instance",),
    )  # fmt: skip
    return {name: value.values.squeeze() for name, value in HeadSharing().measure(probe).items()}


def split(shares):
    """Heads that carry the two pairs with the given shares."""
    W_K = torch.zeros(len(shares), 4, 4)
    for head, (a, b) in enumerate(shares):
        W_K[head, 0, 2], W_K[head, 1, 3] = a, b
    return shared(W_K)


def test_a_head_per_pair_has_participation_one_and_no_superposition():
    found = split([(3.0, 0.0), (0.0, 2.0)])
    assert found["heads/participation"].item() == pytest.approx(1)
    assert found["heads/best"].item() == pytest.approx(1, abs=1e-5)
    assert found["heads/superposition"].item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(found["head/share"], torch.eye(2))


def test_pairs_spread_over_all_heads_have_participation_n_heads():
    found = split([(1.0, 0.5)] * 4)
    assert found["heads/participation"].item() == pytest.approx(4)
    assert found["heads/combined"].item() == pytest.approx(1, abs=1e-5)


def test_features_that_only_the_sum_of_the_heads_has_are_superposition():
    W_K = torch.zeros(2, 4, 4)  # the sum of the two is diagonal on the pairs, neither of them is
    W_K[0, :2, 2:] = torch.tensor([[2.0, 1.5], [1.5, 1.0]])
    W_K[1, :2, 2:] = torch.tensor([[1.0, -1.5], [-1.5, 0.5]])
    found = shared(W_K)
    assert found["heads/combined"].item() == pytest.approx(1, abs=1e-5)
    assert found["heads/superposition"].item() > 0.05


@pytest.mark.parametrize("options", [{"n_heads": 2}, {"rope": True, "d_head": 6, "context_length": 3}])
def test_each_head_and_each_offset_is_compared_with_the_theory_by_itself(options):
    model = ToyAttentionModel(14, 7, n_instances=2, **options)
    found = measured(TheoryGap(), model)
    assert found["theory/left"].shape == (2, *model.probe().heads.W_Q.shape[1:-2])
    assert found["theory/bound"].shape == (2,)


def test_features_that_the_head_ignores_leave_no_residual():
    model = ToyAttentionModel(6, 7, init_features="orthonormal", init_head="aligned")
    assert measured(TheoryGap(), model)["theory/residual"].item() == pytest.approx(0, abs=1e-6)
    model = ToyAttentionModel(14, 7, init_features="tight_frame", init_head="aligned")
    assert measured(TheoryGap(), model)["theory/residual"].item() > 0.1


def test_callbacks_that_look_at_one_probe_share_its_decomposition(monkeypatch):
    calls = []
    decompose = AttentionHeads.svd
    monkeypatch.setattr(AttentionHeads, "svd", lambda heads: (calls.append(heads), decompose(heads))[1])
    probe = Probe.stack([ToyAttentionModel(14, 7).probe().snapshot()])
    SVDAlignment().measure(probe)
    PairSharing().measure(probe)
    assert len(calls) == 1
    assert torch.equal(probe.snapshot().svd.S, probe.svd.S)
    assert len(calls) == 2  # a copy has tensors, and a decomposition, of its own
