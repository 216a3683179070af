"""PairSharing and HeadSharing on heads that are known."""

import numpy as np
import pytest
import torch
from helpers.probes import measured, probe_of
from scipy.optimize import linear_sum_assignment

from svf_lightning.callbacks import HeadSharing, PairSharing
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.toy import ToyAttentionModel

# ---- target pairs that share a singular pair


def test_pairs_with_a_singular_pair_of_their_own_are_counted_as_aligned():
    eye = torch.eye(4)[None]
    omega = torch.zeros(1, 4, 4)
    omega[0, 0, 2], omega[0, 1, 3] = 3.0, 2.0
    found = PairSharing().measure(probe_of(eye, omega, eye, [(0, 2), (1, 3)]))
    assert found["sharing/n_aligned"].item() == 2
    assert found["sharing/n_shared"].item() == 0
    torch.testing.assert_close(found["pair/best"], torch.ones(1, 1, 2))
    assert found["pair/best_index"].flatten().tolist() == [0, 1]


def test_pairs_on_one_singular_vector_share_it():
    eye = torch.eye(4)[None]
    omega = torch.zeros(1, 4, 4)
    omega[0, 0, 3] = omega[0, 1, 3] = 3.0  # features 0 and 1 both attend to 3: rank one
    found = PairSharing().measure(probe_of(eye, omega, eye, [(0, 3), (1, 3)]))
    assert found["sharing/n_shared"].item() == 1
    assert found["sharing/n_aligned"].item() == 0
    torch.testing.assert_close(found["sharing/best"], torch.full((1, 1), (0.5**0.5 + 1) / 2))


def test_the_best_index_of_a_pair_is_that_of_a_dense_search_whoever_else_has_it():
    pairs = [(i, i + 6, 2.0) for i in range(6)]
    model = ToyAttentionModel(
        n_features=13, d_model=7, d_head=3, n_instances=2, template=pairs, target_logit=None, init_feature_norm=1.0
    ).double()
    found = measured(PairSharing(aligned=0.4), model)
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        U, _, Vt = np.linalg.svd(W_Q.T @ W_K)
        unit = W / np.linalg.norm(W, axis=0)
        left, right = np.abs(unit[:, :6].T @ U[:, :3]), np.abs(unit[:, 6:12].T @ Vt[:3].T)
        index = (left * right).argmax(1)
        best = (left[range(6), index] + right[range(6), index]) / 2
        assert found["pair/best_index"][i].tolist() == index.tolist()
        np.testing.assert_allclose(found["pair/best"][i], best)
        assert found["sharing/best"][i].item() == pytest.approx(best.mean())
        assert found["sharing/n_shared"][i].item() == (np.bincount(index) >= 2).sum()
        pair, at = linear_sum_assignment(left * right, maximize=True)  # of six pairs, one for each singular pair
        assert found["sharing/n_aligned"][i].item() == ((left[pair, at] + right[pair, at]) / 2 >= 0.4).sum() > 0


def with_biases():
    """A layer of two heads with biases as in a replay, two pairs of features, and the dense forms of the heads.

    The forms have one more coordinate, in which features are zero.
    """
    g = torch.Generator().manual_seed(0)
    weights, biases = torch.randn(2, 1, 2, 5, 7, generator=g), torch.randn(2, 1, 2, 5, generator=g)
    features = torch.randn(7, 4, generator=g)
    probe = Probe(
        0, AttentionHeads(*weights, *biases), features, torch.tensor([[0, 2], [1, 3]]),
        batch_dims=("layer", "head"), feature_dims=(),
    )  # fmt: skip
    W_Q, W_K = torch.cat([weights, biases[..., None]], -1)[:, 0].double().numpy()
    unit = np.concatenate([(features / features.norm(dim=0)).double().numpy(), np.zeros((1, 4))])
    return Probe.stack([probe]), np.swapaxes(W_Q, 1, 2) @ W_K, unit


def test_pairs_of_heads_with_biases_are_compared_with_their_singular_vectors():
    probe, omegas, unit = with_biases()
    found = PairSharing().measure(probe)
    for head, omega in enumerate(omegas):
        U, _, Vt = np.linalg.svd(omega)
        left, right = np.abs(unit[:, :2].T @ U[:, :5]), np.abs(unit[:, 2:].T @ Vt[:5].T)
        index = (left * right).argmax(1)
        assert found["pair/best_index"][0, 0, head].tolist() == index.tolist()
        best = (left[range(2), index] + right[range(2), index]) / 2
        assert found["sharing/best"][0, 0, head].item() == pytest.approx(best.mean(), abs=1e-4)


def test_a_threshold_out_of_range_is_an_input_error():
    with pytest.raises(InputError, match="aligned=1"):
        PairSharing(aligned=1.0)


# ---- heads that share a template


def shared(W_K):
    """HeadSharing of heads Omega_h = W_K[h] [head, 4, 4] with the pairs (0, 2) and (1, 3) of orthonormal features."""
    eye = torch.eye(4)
    probe = probe_of(
        eye.expand_as(W_K[None]), W_K[None], eye[None], [(0, 2), (1, 3)],
        batch_dims=("instance", "head"), feature_dims=("instance",),
    )  # fmt: skip
    return {name: value.squeeze() for name, value in HeadSharing().measure(probe).items()}


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


def test_the_sum_of_the_heads_is_that_of_their_dense_forms():
    model = ToyAttentionModel(
        n_features=13,
        d_model=7,
        d_head=2,
        n_heads=3,
        n_instances=2,
        template="linear",
        n_pairs=2,
        init_feature_norm=1.0,
    ).double()
    found = measured(HeadSharing(), model)
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        unit = W / np.linalg.norm(W, axis=0)
        omegas = [W_Q[2 * h : 2 * h + 2].T @ W_K[2 * h : 2 * h + 2] for h in range(3)]
        logits = np.abs([[W[:, p] @ omega @ W[:, p + 2] for p in range(2)] for omega in omegas])
        share = logits / logits.sum(0)
        np.testing.assert_allclose(found["head/share"][i], share)
        assert found["heads/participation"][i].item() == pytest.approx((1 / (share**2).sum(0)).mean())
        U, _, Vt = np.linalg.svd(sum(omegas))
        left, right = np.abs(unit[:, :2].T @ U[:, :6]), np.abs(unit[:, 2:4].T @ Vt[:6].T)
        gain = left * right
        # two pairs: the better of the ways to give each a singular pair of its own
        ways = [(a, b) for a in range(6) for b in range(6) if a != b]
        a, b = max(ways, key=lambda way: gain[0, way[0]] + gain[1, way[1]])
        combined = (left[0, a] + right[0, a] + left[1, b] + right[1, b]) / 4
        assert found["heads/combined"][i].item() == pytest.approx(combined)
        assert found["heads/superposition"][i].item() == pytest.approx(combined - found["heads/best"][i].item())


def test_heads_with_biases_are_compared_with_their_singular_vectors_alone_and_together():
    probe, omegas, unit = with_biases()
    found = HeadSharing().measure(probe)
    best = []
    for omega in omegas:
        U, _, Vt = np.linalg.svd(omega)
        left, right = np.abs(unit[:, :2].T @ U[:, :5]), np.abs(unit[:, 2:].T @ Vt[:5].T)
        index = (left * right).argmax(1)
        best.append((left[range(2), index] + right[range(2), index]) / 2)
    assert found["heads/best"].item() == pytest.approx(np.max(best, axis=0).mean(), abs=1e-4)
    assert found["heads/combined"].shape == (1, 1)


@pytest.mark.parametrize(
    "options", [{}, {"n_heads": 2, "rope": True, "context_length": 3, "d_head": 4}, {"template": "zero"}]
)
def test_without_heads_side_by_side_there_is_nothing_to_share(options):
    """With rope, heads have an offset each: they are no forms that add up."""
    assert measured(HeadSharing(), ToyAttentionModel(n_features=13, d_model=7, **options)) == {}


def test_without_target_pairs_there_is_nothing():
    assert measured(PairSharing(), ToyAttentionModel(n_features=13, d_model=7, template="zero")) == {}


def test_their_options_are_their_arguments():
    assert PairSharing().options() == {"aligned": 0.9}
    assert PairSharing(0.5).options() == {"aligned": 0.5}
    assert HeadSharing().options() == {}
