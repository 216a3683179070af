"""Where weights start: controlled geometry of features, heads that are given."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from svf_lightning.errors import InputError
from svf_lightning.metrics import interference
from svf_lightning.toy import ToyAttentionModel
from svf_lightning.toy.template import make_template
from svf_lightning.toy.weights import initial_features, initial_head, unit_norm_tight_frame


def features(kind, n_features=12, d_model=6, seeds=(0, 1), strength=0.0):
    strengths = torch.as_tensor(strength, dtype=torch.float64).expand(len(seeds))
    return initial_features(kind, n_features=n_features, d_model=d_model, seeds=seeds, cone_strength=strengths)


@pytest.mark.parametrize(("n_features", "d_model"), [(12, 6), (13, 6), (7, 7), (50, 11)])
def test_a_tight_frame_has_unit_columns_and_an_isotropic_covariance(n_features, d_model):
    W = features("tight_frame", n_features, d_model)
    torch.testing.assert_close(W.norm(dim=1), torch.ones(2, n_features).double())
    expected = (torch.eye(d_model) * n_features / d_model).double().expand(2, -1, -1)
    torch.testing.assert_close(W @ W.mT, expected, rtol=0, atol=1e-7)


def test_orthonormal_features_are_orthonormal():
    W = features("orthonormal", 5, 6)
    torch.testing.assert_close(W.mT @ W, torch.eye(5).double().expand(2, -1, -1))


def test_a_cone_of_strength_zero_is_the_tight_frame():
    assert torch.equal(features("cone"), features("tight_frame"))


@pytest.mark.parametrize(("n_features", "d_model"), [(40, 20), (100, 50), (128, 64)])
def test_the_axis_of_a_cone_has_nothing_to_do_with_the_head(n_features, d_model):
    cosines = []
    for seed in range(8):
        sizes = {"n_features": n_features, "d_model": d_model, "n_instances": 1, "seed": seed}
        model = ToyAttentionModel(init_features="cone", cone_strength=50.0, **sizes)  # every feature is the axis
        axis = model.W[0].mean(-1)
        rows = torch.cat([model.W_Q[0], model.W_K[0]])
        cosines.append((rows @ axis / rows.norm(dim=1) / axis.norm()).abs().max().item())
    assert max(cosines) < 5 / d_model**0.5  # the largest of 2D random ones, in eight draws


def test_a_stronger_cone_interferes_more_and_keeps_unit_columns():
    W = features("cone", seeds=(3,) * 5, strength=[0.0, 0.2, 0.5, 1.0, 3.0])
    assert (interference(W).diff() > 0).all()
    torch.testing.assert_close(W.norm(dim=1), torch.ones(5, 12).double())


@pytest.mark.parametrize("kind", ["random", "tight_frame", "cone"])
def test_an_instance_starts_alike_alone_and_in_a_cohort(kind):
    together = features(kind, seeds=(4, 5, 6), strength=0.3)
    assert torch.equal(features(kind, seeds=(5,), strength=0.3)[0], together[1])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(("kind", "sizes"), [("orthonormal", (7, 6)), ("tight_frame", (5, 6)), ("cone", (5, 6))])
def test_a_geometry_that_the_sizes_do_not_allow_is_an_input_error(kind, sizes):
    with pytest.raises(InputError, match="n_features"):
        features(kind, *sizes)


def test_a_frame_that_is_not_found_is_an_input_error():
    with pytest.raises(InputError, match="tight frame"):
        unit_norm_tight_frame(torch.eye(2).double().repeat_interleave(torch.tensor([3, 1]), dim=1))


@pytest.mark.parametrize("per_instance", [False, True])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_from_a_file_are_taken_as_they_are(tmp_path, suffix, per_instance):
    W = torch.randn(*((2,) if per_instance else ()), 6, 12, dtype=torch.float32)
    path = tmp_path / f"features{suffix}"
    if suffix == ".npy":
        np.save(path, W.numpy())
    else:
        save_file({"decoder": W}, path)
    model = ToyAttentionModel(n_features=12, d_model=6, n_instances=2, init_features=str(path), init_feature_norm=0.01)
    assert torch.equal(model.W.detach(), W.expand(2, -1, -1))


def test_a_file_that_does_not_fit_is_an_input_error_that_shows_both_shapes(tmp_path):
    np.save(tmp_path / "w.npy", np.zeros((6, 11)))
    with pytest.raises(InputError, match=r"\(6, 11\).*\(6, 12\)"):
        features(str(tmp_path / "w.npy"))


@pytest.mark.parametrize("content", ["pickle", "nan", "garbage", "missing"])
def test_a_file_that_cannot_be_trusted_is_an_input_error(tmp_path, content):
    path = tmp_path / "w.npy"
    if content == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif content == "nan":
        np.save(path, np.full((6, 12), np.nan))
    elif content == "garbage":
        path.write_bytes(b"not an array")
    with pytest.raises(InputError, match="init_features"):
        features(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="tight_frame"):
        features("thight_frame")


def test_the_optimal_head_is_the_least_squares_optimum_of_the_logits():
    W, template = features("random"), make_template("linear", n_features=12, n_instances=2, n_pairs=3)
    W_Q, W_K = initial_head("optimal", features=W, template=template, d_head=6)
    for w, T, omega in zip(W.numpy(), template.matrix().double().numpy(), (W_Q.mT @ W_K).numpy(), strict=True):
        np.testing.assert_allclose(omega, np.linalg.pinv(w).T @ T @ np.linalg.pinv(w), atol=1e-10)


@pytest.mark.parametrize("d_head", [1, 2, 6, 9])
def test_a_given_head_of_lower_dimension_is_the_nearest_one_of_that_rank(d_head):
    W, template = features("random"), make_template("linear", n_features=12, n_instances=2, n_pairs=3)
    full, cut = (
        (lambda q, k: q.mT @ k)(*initial_head("optimal", features=W, template=template, d_head=h)) for h in (6, d_head)
    )
    error = torch.linalg.matrix_norm(full - cut)
    torch.testing.assert_close(error, torch.linalg.svdvals(full)[:, d_head:].norm(dim=-1), rtol=1e-8, atol=1e-12)


def test_the_singular_vectors_of_the_aligned_head_are_the_features():
    W, template = 3 * features("tight_frame"), make_template("single", n_features=12, n_instances=2, target_logit=5.0)
    W_Q, W_K = initial_head("aligned", features=W, template=template, d_head=6)
    expected = 5 * (W[:, :, :1] / 3) @ (W[:, :, 1:2] / 3).mT
    torch.testing.assert_close(W_Q.mT @ W_K, expected)


def test_a_head_from_a_file_is_taken_as_it_is(tmp_path):
    head = {name: torch.randn(3, 6) for name in ("W_Q", "W_K")}
    save_file(head, tmp_path / "head.safetensors")
    model = ToyAttentionModel(
        n_features=12, d_model=6, d_head=3, n_instances=2, init_head=str(tmp_path / "head.safetensors")
    )
    assert torch.equal(model.W_Q.detach(), head["W_Q"].expand(2, -1, -1))
    assert torch.equal(model.W_K.detach(), head["W_K"].expand(2, -1, -1))
    with pytest.raises(InputError, match="W_Q"):
        ToyAttentionModel(n_features=12, d_model=6, d_head=4, init_head=str(tmp_path / "head.safetensors"))
