"""Capacity on heads that are known: the best head of its rank, and others."""

import numpy as np
import pytest
import torch
from helpers.probes import measured, probe_of

from svf_lightning.callbacks import Capacity
from svf_lightning.theory import best_of_rank
from svf_lightning.toy import ToyAttentionModel

PAIRS = [(i, i + 6, float(6 - i)) for i in range(6)]


def model():
    return ToyAttentionModel(
        n_features=13, d_model=7, d_head=3, n_instances=2, template=PAIRS, target_logit=None, init_feature_norm=1.0
    ).double()


def test_the_head_that_the_closed_form_names_is_predicted_without_error():
    toy = model()
    for i in range(2):
        W = toy.W.detach()[i]
        U, S, Vh = torch.linalg.svd(best_of_rank(W, toy.template.matrix()[i].double(), W, 3).omega)
        toy.W_Q.data[i], toy.W_K.data[i] = (U[:, :3] * S[:3]).mT, Vh[:3]
    found = measured(Capacity(), toy)
    for name in ("capacity/subspace", "capacity/omega"):
        torch.testing.assert_close(found[name], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(found["capacity/logit_error"], torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (found["capacity/logit_error_of_any_rank"] > 0.01).all()


def test_any_head_is_compared_with_a_dense_computation_of_the_best_one():
    toy = model()
    found = measured(Capacity(), toy)
    query, key = np.arange(6), np.arange(6, 12)
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (toy.W, toy.W_Q, toy.W_K))
        T = toy.template.matrix()[i].double().numpy()
        P = np.linalg.pinv(W) @ W
        U, S, Vh = np.linalg.svd(P @ T @ P)
        logits = (U[:, :3] * S[:3]) @ Vh[:3]
        best = np.linalg.pinv(W).T @ logits @ np.linalg.pinv(W)
        omega, targets = W_Q.T @ W_K, T[query, key]
        trained = (W.T @ omega @ W)[query, key]
        np.testing.assert_allclose(found["pair/predicted_logit"][i], logits[query, key], atol=1e-9)
        assert found["capacity/lost"][i].item() == pytest.approx(1 - (S[:3] ** 2).sum() / (T**2).sum())
        assert found["capacity/predicted_served"][i].item() == np.mean(logits[query, key] >= targets / 2)
        assert found["capacity/omega"][i].item() == pytest.approx(
            (omega * best).sum() / np.linalg.norm(omega) / np.linalg.norm(best)
        )
        for name, predicted in (("", logits), ("_of_any_rank", P @ T @ P)):
            error = np.sqrt(np.mean((trained - predicted[query, key]) ** 2) / np.mean(targets**2))
            assert found[f"capacity/logit_error{name}"][i].item() == pytest.approx(error)
        spans = [np.linalg.svd(m) for m in (omega, best)]
        left = np.linalg.norm(spans[0][0][:, :3].T @ spans[1][0][:, :3]) ** 2 / 3
        right = np.linalg.norm(spans[0][2][:3] @ spans[1][2][:3].T) ** 2 / 3
        assert found["capacity/subspace"][i].item() == pytest.approx((left + right) / 2)


def test_orthonormal_features_fill_a_head_with_the_strongest_pairs():
    eye = torch.eye(4)[None]
    head = torch.zeros(1, 1, 4)
    head[0, 0, 0] = 1.0
    found = Capacity().measure(probe_of(head, head, eye, [(0, 2), (1, 3)]))  # two pairs of the same strength
    assert found["capacity/lost"].item() == pytest.approx(0.5)
    assert found["pair/predicted_logit"].sum().item() == pytest.approx(1.0)


def test_a_model_without_a_head_has_no_capacity():
    assert measured(Capacity(), ToyAttentionModel(n_features=13, d_model=7, template="zero")) == {}


def test_of_fewer_pairs_than_dimensions_only_the_subspace_that_the_best_head_uses_counts():
    toy = ToyAttentionModel(
        n_features=13, d_model=7, d_head=5, n_instances=2, template=PAIRS[:2], target_logit=None, init_feature_norm=1.0
    ).double()
    found = measured(Capacity(), toy)["capacity/subspace"]
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (toy.W, toy.W_Q, toy.W_K))
        T = toy.template.matrix()[i].double().numpy()
        best = np.linalg.svd(np.linalg.pinv(W).T @ T @ np.linalg.pinv(W))
        head = np.linalg.svd(W_Q.T @ W_K)
        left = np.linalg.norm(head[0][:, :5].T @ best[0][:, :2]) ** 2 / 2
        right = np.linalg.norm(head[2][:5] @ best[2][:2].T) ** 2 / 2
        assert found[i].item() == pytest.approx((left + right) / 2)
