"""NearestFeature against dense computations, in the toy model and in a language model."""

import numpy as np
import pytest
import torch
from helpers.probes import measured
from helpers.replays import replay
from transformers import AutoModelForCausalLM

from svf_lightning.callbacks import NearestFeature
from svf_lightning.errors import InputError
from svf_lightning.probe import Probe
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.toy import ToyAttentionModel


def unit(columns):
    return columns / np.linalg.norm(columns, axis=0)


def cosines(X, vectors):
    """|cos| of all columns with all columns."""
    return np.abs(unit(X).T @ unit(vectors))


def toy(**options):
    sizes = {"n_features": 13, "d_model": 7, "n_instances": 2, "init_feature_norm": 1.0}
    return ToyAttentionModel(**{**sizes, **options}).double()


def test_the_nearest_feature_is_that_of_a_dense_search_as_it_is_and_unwhitened():
    model = toy()
    found = measured(NearestFeature(), model)
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        U, _, Vt = np.linalg.svd(W_Q.T @ W_K)
        sigma = unit(W) @ unit(W).T
        for side, first in (("left", U[:, :1]), ("right", Vt[:1].T)):
            nearest = cosines(W, first)[:, 0]
            assert found[f"alignment/nearest_{side}"][i].item() == pytest.approx(nearest.max())
            assert found[f"nearest/{side}_feature"][i].item() == nearest.argmax()
            unwhitened = cosines(W, sigma @ first).max()
            assert found[f"alignment/nearest_unwhitened_{side}"][i].item() == pytest.approx(unwhitened)


def test_chance_is_the_mean_nearness_of_random_directions():
    model = toy()
    found = measured(NearestFeature(n_random=9, seed=4), model)
    random = torch.randn(7, 9, generator=torch.Generator().manual_seed(4)).double().numpy()
    for i in range(2):
        W = model.W.detach()[i].numpy()
        assert found["alignment/nearest_random"][i].item() == pytest.approx(cosines(W, random).max(0).mean())
        unwhitened = cosines(W, unit(W) @ unit(W).T @ random).max(0).mean()
        assert found["alignment/nearest_unwhitened_random"][i].item() == pytest.approx(unwhitened)


def test_the_alignment_of_pairs_is_measured_with_unit_features_whatever_their_lengths():
    model = toy(init_features="cone", cone_strength=0.7, init_head="optimal")
    sure = measured(NearestFeature(), model)["alignment/unwhitened_unit"]
    torch.testing.assert_close(sure, torch.ones(2).double(), atol=1e-5, rtol=0)  # Theorem 1 backwards
    with torch.no_grad():
        model.W *= torch.linspace(0.1, 10, 13)
    torch.testing.assert_close(measured(NearestFeature(), model)["alignment/unwhitened_unit"], sure, atol=1e-5, rtol=0)
    model = toy()
    found = measured(NearestFeature(), model)["alignment/unwhitened_unit"]
    for i in range(2):
        W, W_Q, W_K = (p.detach()[i].numpy() for p in (model.W, model.W_Q, model.W_K))
        U, _, Vt = np.linalg.svd(W_Q.T @ W_K)
        sigma = unit(W) @ unit(W).T
        left, right = cosines(W[:, :1], sigma @ U)[0], cosines(W[:, 1:2], sigma @ Vt.T)[0]
        k = (left * right).argmax()
        assert found[i].item() == pytest.approx((left[k] + right[k]) / 2)


def test_the_random_directions_spare_the_global_generator():
    state = torch.get_rng_state()
    first = measured(NearestFeature(), toy())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    again = measured(NearestFeature(), toy())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_without_heads_or_features_there_is_nothing_and_without_pairs_no_alignment_of_them():
    probe = toy().probe()
    for shown in (Probe(0, probe.heads), Probe(0, features=probe.features)):
        assert NearestFeature().measure(Probe.stack([shown.snapshot()])) == {}
    found = NearestFeature().measure(Probe.stack([Probe(0, probe.heads, probe.features).snapshot()]))
    assert "alignment/nearest_left" in found
    assert "alignment/unwhitened_unit" not in found


def test_in_a_language_model_with_biases_the_bias_coordinate_of_a_feature_is_zero(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    tokenizer = source.tokenizer()
    words = [*list(dict.fromkeys(p.text.split()[-1] for p in ReplayData(source, n_prompts=4).prompts)), "the", "and"]
    words = [w for w in words if tokenizer.convert_tokens_to_ids(w) != tokenizer.unk_token_id]
    model = CheckpointReplay(features=words, feature_pairs=[[words[0], words[1]]])
    rows = replay(source, tmp_path, model=model, callbacks=(NearestFeature(n_random=5),)).isel(step=0)
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    X = bridge.W_E[[tokenizer.convert_tokens_to_ids(w) for w in words]].T.detach().double().numpy()
    # one head, from the dense form with its bias coordinate
    W_Q, W_K = (
        torch.cat([w[1, 2].T, b[1, 2][:, None]], 1).double().detach().numpy()
        for w, b in ((bridge.W_Q, bridge.b_Q), (bridge.W_K, bridge.b_K))
    )
    U, _, Vt = np.linalg.svd(W_Q.T @ W_K)
    padded = np.concatenate([unit(X), np.zeros((1, len(words)))])
    nearest = cosines(padded, U[:, :1]).max()
    assert float(rows["alignment/nearest_left"][1, 2]) == pytest.approx(nearest, rel=1e-3)
    unwhitened = padded @ (padded.T @ Vt[0])
    expected = np.abs(padded.T @ unwhitened).max() / np.linalg.norm(unwhitened)
    assert float(rows["alignment/nearest_unwhitened_right"][1, 2]) == pytest.approx(expected, rel=1e-3)
    assert {"alignment/matched", "alignment/unwhitened_unit"} <= set(rows.data_vars)
    # few features: un-whitening puts any direction into their span, and the control says so
    assert float(rows["alignment/nearest_unwhitened_random"]) > float(rows["alignment/nearest_random"])


def test_no_random_direction_is_an_input_error():
    with pytest.raises(InputError, match="n_random=0"):
        NearestFeature(n_random=0)


def test_its_options_are_its_arguments():
    assert NearestFeature().options() == {"n_random": 64, "seed": 0}
    assert NearestFeature(5, seed=2).options() == {"n_random": 5, "seed": 2}
