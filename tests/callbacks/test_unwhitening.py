"""Un-whitening in a language model against dense computations from what its heads read in a plain forward pass."""

import json

import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, bridge
from helpers.replays import STEPS, replay
from transformers import AutoModelForCausalLM, AutoTokenizer

from svf_lightning.callbacks import Measured, Unwhitening
from svf_lightning.errors import CheckpointError, InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.text import Text, hand_over_reads, read_text
from svf_lightning.trajectory import open_trajectory

WORDS = [" Mary", " John", " store", " park", " ring", " ball", " Alice"]
LENGTH = torch.tensor([9, 6])


def tokens():
    return torch.randint(2, 101, (2, 9), generator=torch.Generator().manual_seed(2))


def read_by_hand(model, ids, length):
    """What heads read at all tokens but the first and the padding [layer, token, D]."""
    _, cache = model.run_with_cache(ids)
    layers = []
    for layer in range(model.cfg.n_layers):
        x = cache[f"blocks.{layer}.attn.hook_in"]
        layers.append(torch.cat([x[b, 1 : int(n)] for b, n in enumerate(length)]))
    return torch.stack(layers).detach().double().numpy()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_heads_read_is_what_a_forward_pass_shows_without_first_token_and_padding(family):
    model, seen = bridge(family), {}
    hand_over_reads(model, tokens(), LENGTH, lambda layer, x: seen.update({layer: x}))
    assert list(seen) == list(range(model.cfg.n_layers))
    np.testing.assert_allclose(np.stack([x.numpy() for x in seen.values()]), read_by_hand(model, tokens(), LENGTH))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_makes_its_queries_of_what_is_handed_over(family):
    model, seen = bridge(family), {}
    hand_over_reads(model, tokens(), None, lambda layer, x: seen.update({layer: x}))
    _, cache = model.run_with_cache(tokens())
    heads = AttentionHeads.from_bridge(model)
    for layer, x in seen.items():
        q = cache[f"blocks.{layer}.attn.hook_q"][:, 1:].flatten(0, 1)
        rebuilt = torch.einsum("hid,nd->nhi", heads.W_Q[layer], x)
        if heads.b_Q is not None:
            rebuilt = rebuilt + heads.b_Q[layer]
        torch.testing.assert_close(rebuilt, q, rtol=1e-4, atol=1e-4)


def test_numbers_that_overflow_are_said():
    model = bridge("gpt2")
    with torch.no_grad():
        model.original_model.transformer.wpe.weight[3] = torch.inf
    with pytest.raises(CheckpointError, match="layer 0 read overflows"):
        hand_over_reads(model, tokens(), None, lambda layer, x: None)


def oas(S, n):
    values = np.linalg.eigvalsh(S)
    D, squares, trace = len(values), (values**2).sum(), values.sum()
    rho = min(1.0, ((1 - 2 / D) * squares + trace**2) / ((n + 1 - 2 / D) * (squares - trace**2 / D)))
    return (1 - rho) * S + rho * trace / D * np.eye(D), rho


def nearest(X, direction):
    return np.abs(X.T @ direction / np.linalg.norm(X, axis=0) / np.linalg.norm(direction))


@pytest.fixture(scope="module")
def rows(suite, tmp_path_factory):
    """The tiny suite with words as features, measured with their tokens' own covariance."""
    model = CheckpointReplay(features=WORDS, feature_pairs=[[" Mary", " store"], [" John", " park"]])
    source = FolderCheckpoints(folder=str(suite))
    return replay(source, tmp_path_factory.mktemp("own"), model=model, callbacks=[Unwhitening(n_random=5)])


def test_a_replay_measures_what_dense_algebra_does(rows, suite):
    model = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    tokenizer = AutoTokenizer.from_pretrained(suite / "step8")
    prompts = [str(text) for text in rows.prompt_text.values]
    read = [read_by_hand(model, torch.tensor([ids]), [len(ids)]) for ids in tokenizer(prompts)["input_ids"]]
    read = np.concatenate(read, axis=1)
    X = model.W_E[[tokenizer.encode(word)[0] for word in WORDS]].detach().double().numpy().T
    heads = AttentionHeads.from_bridge(model)
    last = rows.isel(step=-1)
    for layer in range(2):
        Sigma, rho = oas(np.cov(read[layer].T, bias=True), read.shape[1])
        assert last["unwhitening/shrinkage"][layer].item() == pytest.approx(rho, rel=1e-4)
        rank = np.trace(Sigma) ** 2 / (Sigma**2).sum()
        assert last["unwhitening/effective_rank"][layer].item() == pytest.approx(rank, rel=1e-4)
        assert last["unwhitening/tokens"][layer].item() == read.shape[1]
        for head in range(3):
            b_Q, b_K = (b[layer, head].double().numpy() for b in (heads.b_Q, heads.b_K))
            Q, K = (
                np.c_[W[layer, head].double().numpy(), b]
                for W, b in ((heads.W_Q.detach(), b_Q), (heads.W_K.detach(), b_K))
            )
            U, _, Vt = np.linalg.svd(Q.T @ K)
            for side, basis in (("left", U), ("right", Vt.T)):
                first = basis[:-1, 0]
                near = nearest(X, Sigma @ first)
                assert last[f"unwhitening/{side}"][layer, head].item() == pytest.approx(near.max(), abs=2e-4)
                assert last[f"unwhitening/{side}_feature"][layer, head].item() == near.argmax()
                plain = nearest(X, first).max()
                assert last[f"unwhitening/plain_{side}"][layer, head].item() == pytest.approx(plain, abs=2e-4)


def test_random_directions_are_those_of_the_heads_own_space_and_make_the_null():
    probe, model = toy_like_probe()
    found = measured_once(Unwhitening(n_random=400, seed=1), probe)
    X = probe.features.numpy()
    Sigma = oas(np.cov(model["tokens"][0].T, bias=True), len(model["tokens"][0]))[0]
    rng = np.random.default_rng(5)
    U, _, Vt = np.linalg.svd(probe.heads.W_Q[0, 0].numpy().T @ probe.heads.W_K[0, 0].numpy())
    for side, basis in (("left", U[:, :2]), ("right", Vt[:2].T)):
        draws = np.stack([nearest(X, Sigma @ basis @ rng.normal(size=2)).max() for _ in range(4000)])
        assert found[f"unwhitening/random_{side}"][0, 0, 0].item() == pytest.approx(draws.mean(), abs=0.02)
        own = nearest(X, Sigma @ basis[:, 0]).max()
        share = found[f"unwhitening/percentile_{side}"][0, 0, 0].item()
        assert share == pytest.approx((draws < own).mean(), abs=0.1)


def toy_like_probe(tokens=None, features=None, W_Q=None, W_K=None):
    """One layer, one head of rank 2 in five dimensions."""
    rng = np.random.default_rng(0)
    shown = [rng.normal(size=(200, 5)) @ np.diag([4, 2, 1, 1, 0.5])] if tokens is None else [tokens]
    heads = [torch.from_numpy(rng.normal(size=(1, 1, 2, 5))) if W is None else W for W in (W_Q, W_K)]
    X = torch.from_numpy(rng.normal(size=(5, 6))) if features is None else features

    def read_tokens(take):
        for part in np.array_split(shown[0], 3):
            take(0, torch.from_numpy(part))

    probe = Probe(
        0, heads=AttentionHeads(*heads), features=X, read_tokens=read_tokens, batch_dims=("layer", "head"),
        feature_dims=(),
    )  # fmt: skip
    return probe, {"tokens": shown}


def measured_once(metric, probe):
    metric.observe(probe)
    return {k: v.values if isinstance(v, Measured) else v for k, v in metric.measure(Probe.stack([probe])).items()}


def test_a_head_that_serves_one_feature_is_found_by_unwhitening_and_only_by_it():
    # u = Sigma^-1 x as Theorem 1 has it, beside a second, weaker direction that serves nothing
    rng = np.random.default_rng(4)
    A = rng.normal(size=(5, 5)) @ np.diag([3.0, 2, 1, 1, 0.7])
    tokens = rng.normal(size=(20_000, 5)) @ A.T
    X = rng.normal(size=(5, 3))
    inverse = np.linalg.inv(A @ A.T)
    u, v = (inverse @ X[:, i] / np.linalg.norm(inverse @ X[:, i]) for i in (0, 1))
    other = [side - side @ w * w for side, w in zip(rng.normal(size=(2, 5)), (u, v), strict=True)]
    W_Q, W_K = (
        torch.from_numpy(np.stack([3 * w, 0.5 * o / np.linalg.norm(o)])[None, None])
        for w, o in zip((u, v), other, strict=True)
    )
    probe, _ = toy_like_probe(tokens, torch.from_numpy(X), W_Q, W_K)
    found = measured_once(Unwhitening(), probe)
    for i, side in enumerate(("left", "right")):
        assert found[f"unwhitening/{side}"].item() > 0.99
        assert found[f"unwhitening/{side}_feature"].item() == i
        assert found[f"unwhitening/percentile_{side}"].item() > 0.9
        assert found[f"unwhitening/{side}"] > found[f"unwhitening/plain_{side}"]


def test_pairs_are_matched_and_stand_beside_rotated_bases(rows):
    last = rows.isel(step=-1)
    for name in ("matched", "matched_random"):
        assert last[f"unwhitening/{name}"].dims == ("layer", "head")
        assert (last[f"unwhitening/{name}"] > 0).all()
        assert (last[f"unwhitening/{name}"] <= 1).all()
    assert rows["unwhitening/shrinkage"].dims == ("step", "layer")
    assert list(rows.step.values) == STEPS


def test_without_features_or_tokens_nothing_is_measured():
    probe, _ = toy_like_probe()
    assert measured_once(Unwhitening(), Probe(0, heads=probe.heads, batch_dims=probe.batch_dims)) == {}
    with pytest.raises(InputError, match=r"n_random.*>= 1"):
        Unwhitening(n_random=0)


# --- text


def test_windows_are_the_text_in_order_and_begin_with_the_special_token():
    text = Text(tuple(range(10, 30)), bos=1)
    windows = text.windows(8)
    assert windows.tolist() == [[1, *range(10, 17)], [1, *range(17, 24)]]
    assert Text(tuple(range(10, 30)), None).windows(8).tolist() == [[*range(10, 18)], [*range(18, 26)]]
    assert Text((5, 6, 7), None).windows(None).tolist() == [[5, 6, 7]]
    assert [len(part) for part in Text(tuple(range(5000)), None).batches(None)] == [16, 16, 7]


def test_a_text_is_a_file_or_the_manual_of_python_and_of_no_more_tokens_than_asked(suite, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(suite / "step8")
    (tmp_path / "a.txt").write_text("Mary and John went to the store")
    whole = read_text(str(tmp_path / "a.txt"), tokenizer, 100, None)
    assert list(whole.tokens) == tokenizer.encode("Mary and John went to the store", add_special_tokens=False)
    assert read_text(str(tmp_path / "a.txt"), tokenizer, 3, None).tokens == whole.tokens[:3]
    assert len(read_text("pydoc", tokenizer, 50, None).tokens) == 50
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    for where, what in (("binary", "UTF-8"), ("absent", "UTF-8"), ("empty", "at least two tokens")):
        with pytest.raises(InputError, match=f"text.*{what}"):
            read_text(str(tmp_path / where), tokenizer, 100, None)


def test_a_text_stands_in_for_the_prompts_and_belongs_to_the_identity_of_a_run(typed, suite, tmp_path):
    (tmp_path / "a.txt").write_text("Mary and John went to the store, and John gave a ring to Alice. " * 40)
    common = [
        "replay", "--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}",
        "--data.source.init_args.steps=[8]", "--data.n_prompts=6", f"--model.features={json.dumps(WORDS)}",
        "--trainer.logger=false", "--report=false",
        f"--run_dir={tmp_path / 'run'}", f"--data.text={tmp_path / 'a.txt'}",
    ]  # fmt: skip
    done = typed(*common, "--data.text_tokens=300", "--trainer.callbacks+=svf_lightning.callbacks.Unwhitening")
    assert done.returncode == 0, done.stderr
    rows = open_trajectory(tmp_path / "run")
    text = read_text(str(tmp_path / "a.txt"), AutoTokenizer.from_pretrained(suite / "step8"), 300, None)
    assert rows["unwhitening/tokens"].values.tolist() == [[text.windows(128)[:, 1:].numel()] * 2]
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["text"] == text.hash
    other = typed(*common, "--data.text_tokens=200")
    assert other.returncode == 2
    assert "text" in other.stderr
