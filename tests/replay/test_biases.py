"""What becomes of a head's biases: three conventions, against dense computations from weights and inputs."""

import json

import numpy as np
import pytest
import torch
from helpers.models import bridge, random_model
from helpers.replays import replay
from replay.test_decompose import BATCH, KEY, QUERY, cached, capped, tokens, turned, weights

from svf_lightning.callbacks import DirectionIntervention
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import relative_attention
from svf_lightning.probe import FiringRule
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.decompose import HeadSpace
from svf_lightning.trajectory import open_trajectory

BIASED = ("gpt2", "gpt_neox", "qwen2")
APART = ("separate", "pseudo_inverse")
LENGTH = torch.tensor([11, 9, 7, 11])
each_basis = pytest.mark.parametrize("basis", ["offset", "fixed"])
each_apart = pytest.mark.parametrize("biases", APART)
each_family = pytest.mark.parametrize("family", BIASED)
LAYER, HEAD, PROMPT = 1, 3, 2


def looked_at(family, **options):
    """A model, its heads, and what a pass over the prompts leaves."""
    model = bridge(family)
    space = HeadSpace(model, **options)
    return model, space, space.observe(tokens(), QUERY)


def own_scores(model):
    return cached(model, "attn.hook_attn_scores")[:, BATCH, :, QUERY].permute(1, 2, 0, 3)


def parts_by_hand(model, key: int):
    """Of one head: W_Q x, W_K y and both biases, turned by their positions where the model turns them; the scale."""
    x = cached(model, "attn.hook_in").double().detach()
    W_Q, W_K = (W.detach() for W in weights(model, LAYER, HEAD))  # biases as a last column
    query = int(QUERY[PROMPT])
    if model.cfg.positional_embedding_type == "rotary":
        Q, K = turned(model, LAYER, W_Q, query), turned(model, LAYER, W_K, key)
    else:
        Q, K = W_Q.double().numpy(), W_K.double().numpy()
    q, k = Q[:, :-1] @ x[LAYER, PROMPT, query].numpy(), K[:, :-1] @ x[LAYER, PROMPT, key].numpy()
    return q, k, Q[:, -1], K[:, -1], model.blocks[LAYER].attn.original_component.scaling


@each_basis
@each_apart
@each_family
def test_contributions_and_what_is_left_beside_them_are_the_models_own_scores(family, biases, basis):
    model, space, observed = looked_at(family, rope_basis=basis, biases=biases)
    contributions, scores = space.decompose(observed, KEY)
    seen = observed.is_key[:, None].expand(-1, space.n_heads, -1, -1)
    difference = (capped(model, scores) - own_scores(model))[seen].abs().max()
    assert difference < 1e-5 * scores.abs().max()
    beside = (scores - contributions.sum(-1))[seen].abs().max()
    assert (beside > 0.1 * scores.abs().max()) == (biases == "separate")
    assert contributions.shape[-1] == model.cfg.d_head


@each_basis
@each_family
def test_with_separate_biases_singular_pairs_make_up_the_product_of_what_the_weights_alone_give(family, basis):
    model, space, observed = looked_at(family, rope_basis=basis, biases="separate")
    contributions, _ = space.decompose(observed, KEY)
    for key in range(int(QUERY[PROMPT]) + 1):
        q, k, *_, scale = parts_by_hand(model, key)
        assert contributions[LAYER, HEAD, PROMPT, key].sum().item() == pytest.approx(q @ k * scale, rel=1e-3, abs=1e-4)


@each_basis
@each_family
def test_what_biases_add_is_kept_for_relative_and_for_raw_scores(family, basis):
    model, space, observed = looked_at(family, rope_basis=basis, biases="separate")
    attended = space.attended(observed, KEY)
    of_biases = []
    for key in range(int(QUERY[PROMPT]) + 1):
        q, k, b_Q, b_K, scale = parts_by_hand(model, key)
        of_biases.append((q @ b_K + b_Q @ k + b_Q @ b_K) * scale)
    of_biases = np.array(of_biases)
    key = int(KEY[PROMPT])
    raw = attended.raw_bias[LAYER, HEAD, PROMPT].item()
    assert raw == pytest.approx(of_biases[key], rel=1e-3, abs=1e-4)
    relative = attended.bias[LAYER, HEAD, PROMPT].item()
    assert relative == pytest.approx(of_biases[key] - np.delete(of_biases, key).mean(), rel=1e-3, abs=1e-4)
    assert attended.taken("raw").bias is attended.raw_bias
    # without rotation a relative score keeps one of the three terms
    if family == "gpt2":
        keys = np.array([parts_by_hand(model, j)[1] for j in range(int(QUERY[PROMPT]) + 1)])
        alone = keys[key] - np.delete(keys, key, axis=0).mean(0)
        _, _, b_Q, _, scale = parts_by_hand(model, key)
        assert relative == pytest.approx(b_Q @ alone * scale, rel=1e-3, abs=1e-4)


@each_basis
@each_apart
@each_family
def test_attended_scores_and_the_rest_are_the_models_relative_scores(family, biases, basis):
    model, space, observed = looked_at(family, rope_basis=basis, biases=biases)
    attended = space.attended(observed, KEY)
    found = attended.contributions.sum(-1) + (0 if attended.bias is None else attended.bias)
    assert (attended.bias is None) == (biases == "pseudo_inverse")
    seen = observed.is_key[:, None].expand(-1, space.n_heads, -1, -1)
    own = relative_attention(own_scores(model).double()[..., None], seen)[:, :, BATCH, KEY].sum(-1)
    torch.testing.assert_close(found, own.float(), rtol=1e-3, atol=1e-3)
    assert attended.error.max() < 1e-5


@each_family
def test_moved_through_pseudo_inverses_they_belong_to_tokens_in_the_dense_singular_basis(family):
    model, space, observed = looked_at(family, rope_basis="fixed", biases="pseudo_inverse")
    contributions, _ = space.decompose(observed, KEY)
    W_Q, W_K = (W.double().detach().numpy()[:, :-1] for W in weights(model, LAYER, HEAD))
    scale = model.blocks[LAYER].attn.original_component.scaling
    U, S, Vt = np.linalg.svd(W_Q.T @ W_K * scale)
    rank = model.cfg.d_head
    for key in range(int(QUERY[PROMPT]) + 1):
        q, k, b_Q, b_K, _ = parts_by_hand(model, key)
        query, other = np.linalg.pinv(W_Q) @ (q + b_Q), np.linalg.pinv(W_K) @ (k + b_K)
        expected = (query @ U)[:rank] * S[:rank] * (Vt @ other)[:rank]
        found = contributions[LAYER, HEAD, PROMPT, key].numpy()
        np.testing.assert_allclose(found, expected, atol=3e-4 * np.abs(expected).max())


@each_apart
def test_singular_vectors_are_those_of_the_weights_alone(biases):
    model = bridge("gpt2")
    heads = HeadSpace(model, biases=biases).heads
    assert not heads.has_bias
    assert heads.W_Q.shape[-1] == model.cfg.d_model
    alone = AttentionHeads(heads.W_Q.detach(), heads.W_K.detach(), scale=heads.scale).svd()
    W_Q, W_K = (W.double().detach().numpy()[:, :-1] for W in weights(model, LAYER, HEAD))
    dense = np.linalg.svd(W_Q.T @ W_K * heads.scale)
    np.testing.assert_allclose(alone.S[LAYER, HEAD], dense[1][: model.cfg.d_head], rtol=1e-4)


@each_basis
@each_apart
@each_family
def test_firings_are_the_same_and_their_scores_are_those_of_their_query_by_itself(family, biases, basis):
    model = bridge(family)
    space = HeadSpace(model, rope_basis=basis, biases=biases)
    rule, layers, appended = FiringRule(0.3, first_token=True), [], []
    space.find_firings(tokens(), LENGTH, rule, layers.append)
    HeadSpace(model, rope_basis=basis).find_firings(tokens(), LENGTH, rule, appended.append)
    n = 0
    for found, expected in zip(layers, appended, strict=True):
        for name in ("head", "prompt", "query", "key"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        for i in range(0, len(found.head), 9):
            prompt, query, key = (int(getattr(found, name)[i]) for name in ("prompt", "query", "key"))
            observed = space.observe(tokens()[prompt : prompt + 1], torch.tensor([query]))
            attended = space.attended(observed, torch.tensor([key]))
            layer, head = divmod(int(found.head[i]), space.n_heads)
            for kind in ("relative", "raw"):
                mine, theirs = found.scores.taken(kind), attended.taken(kind)
                size = float(theirs.contributions[layer, head, 0].abs().max())
                torch.testing.assert_close(
                    mine.contributions[i], theirs.contributions[layer, head, 0],
                    rtol=1e-3, atol=1e-4 * max(size, 1) if size == size else 0.0, equal_nan=True,
                )  # fmt: skip
                if biases == "separate":
                    torch.testing.assert_close(
                        mine.bias[i], theirs.bias[layer, head, 0], rtol=1e-3, atol=1e-3, equal_nan=True
                    )
            n += 1
    assert n > 10


@each_basis
def test_a_model_without_biases_has_one_decomposition(basis):
    model = bridge("llama")
    spaces = [HeadSpace(model, rope_basis=basis, biases=biases) for biases in ("appended", *APART)]
    observed = spaces[0].observe(tokens(), QUERY)
    first, *others = (space.attended(observed, KEY) for space in spaces)
    for other in others:
        assert torch.equal(first.contributions, other.contributions)
        assert other.bias is None


def test_a_head_without_an_inverse_cannot_have_its_biases_moved_into_tokens():
    model = random_model("gpt_neox")
    with torch.no_grad():
        qkv = model.gpt_neox.layers[1].attention.query_key_value
        qkv.weight.view(5, 3, 8, -1)[2, 0, 0] = 0
    with pytest.raises(InputError, match=r"biases='pseudo_inverse'.*W_Q of head 2 in layer 1.*--model.biases=appended"):
        HeadSpace(make_bridge(model), biases="pseudo_inverse")
    HeadSpace(make_bridge(model), biases="separate")


def test_an_unknown_convention_is_refused():
    for make in (CheckpointReplay, lambda biases: HeadSpace(bridge("gpt2"), biases=biases)):
        with pytest.raises(InputError, match=r"biases='none'.*'appended' or 'separate' or 'pseudo_inverse'"):
            make(biases="none")


# ---- in a replay


def test_the_convention_is_an_option_of_a_replay_that_its_rows_tell_and_the_default_stays_untold(
    typed, suite, tmp_path
):
    source = ("--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}")
    few = ("--data.source.init_args.steps=[8]", "--data.n_prompts=6", "--trainer.logger=false", "--report=false")
    rows, identities = {}, {}
    for biases in ("appended", *APART):
        result = typed("replay", *source, *few, f"--model.biases={biases}", f"--run_dir={tmp_path / biases}")
        assert result.returncode == 0, result.stderr
        rows[biases] = open_trajectory(tmp_path / biases).isel(step=0)
        identities[biases] = json.loads((tmp_path / biases / "identity.json").read_text())
    for biases in APART:
        assert identities[biases].pop("biases") == biases
        assert identities[biases] == identities["appended"]  # which earlier versions would have written
        assert str(rows[biases]["biases"].values) == biases
        np.testing.assert_allclose(rows[biases]["prompt/attention"], rows["appended"]["prompt/attention"], rtol=1e-4)
        assert not np.allclose(rows[biases]["prompt/sparseness"], rows["appended"]["prompt/sparseness"], rtol=1e-2)
    assert "biases" not in rows["appended"]
    whole, rest = rows["appended"]["sad/score"], rows["separate"]["sad/score_of_biases"]
    np.testing.assert_allclose(rows["separate"]["sad/score"] + rest, whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(rows["pseudo_inverse"]["sad/score"], whole, rtol=1e-3, atol=1e-4)
    assert "sad/score_of_biases" not in rows["appended"]
    refused = typed("replay", *source, *few, "--run_dir", tmp_path / "appended", "--model.biases=separate")
    assert refused.returncode == 2
    assert "biases" in refused.stderr


@each_apart
def test_where_they_are_apart_there_are_no_directions_to_move_along(biases, suite, tmp_path):
    rows = replay(
        FolderCheckpoints(str(suite), steps=[8]), tmp_path, model=CheckpointReplay(biases=biases),
        callbacks=(DirectionIntervention(),),
    )  # fmt: skip
    assert not [name for name in rows if name.startswith("directions/")]
    assert "sad/sparseness" in rows
