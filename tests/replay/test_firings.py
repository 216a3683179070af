"""Firings of a language model's heads against the model's own attention and scores, one query at a time."""

import json

import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, bridge
from helpers.replays import replay
from transformers import AutoModelForCausalLM

from svf_lightning.errors import InputError
from svf_lightning.metrics import relative_attention, sparseness
from svf_lightning.probe import FiringBatch, FiringRule
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.decompose import HeadSpace
from svf_lightning.trajectory import open_trajectory

N = 11
LENGTH = torch.tensor([11, 8, 5])
QUERY = torch.tensor([9, 7, 4])
RULES = {
    "a half": FiringRule(0.5),
    "self and first left out": FiringRule(0.2, self_attention=False),
    "the first token as well": FiringRule("1/(n+1)", first_token=True),
    "falling": FiringRule("min(1, 2.5/n)"),
    "the prompt's own query": FiringRule(0.2, every_query=False),
}


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 101, (3, N), generator=torch.Generator().manual_seed(seed))


def found(space, rule, of=None) -> list[FiringBatch]:
    layers: list[FiringBatch] = []
    space.find_firings(tokens() if of is None else of, LENGTH, rule, layers.append, query=QUERY)
    return layers


def joined(layers, name):
    return torch.cat([getattr(layer, name) for layer in layers])


def joined_scores(layers, name):
    return torch.cat([getattr(layer.scores, name) for layer in layers])


def expected(model, rule) -> set[tuple[int, int, int, int]]:
    """(flattened head, prompt, query, key) by loops over what the model computed."""
    _, cache = model.run_with_cache(tokens())
    pairs = set()
    for layer in range(model.cfg.n_layers):
        pattern, scores = (cache[f"blocks.{layer}.attn.hook_{name}"] for name in ("pattern", "attn_scores"))
        for b in range(3):
            for head in range(model.cfg.n_heads):
                for q in range(int(LENGTH[b])):
                    n_keys = int((pattern[b, :, q].amax(0) > 0).sum())
                    tau = {"1/(n+1)": 1 / (n_keys + 1), "min(1, 2.5/n)": min(1, 2.5 / n_keys)}.get(rule.tau, rule.tau)
                    for k in range(q + 1):
                        fires = pattern[b, head, q, k] >= tau and scores[b, head, q, k] > 0
                        fires &= rule.first_token or k > 0
                        fires &= rule.every_query or q == int(QUERY[b])
                        if fires and (rule.self_attention or k != q):
                            pairs.add((layer * model.cfg.n_heads + head, b, q, k))
    return pairs


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("family", CONFIGS)
def test_firings_are_all_pairs_with_enough_attention_and_a_positive_score(family, rule):
    model = bridge(family)
    layers = found(HeadSpace(model), rule)
    pairs = list(zip(*(joined(layers, name).tolist() for name in ("head", "prompt", "query", "key")), strict=True))
    assert len(set(pairs)) == len(pairs) > 10
    assert set(pairs) == expected(model, rule)
    of_layer = [set((layer.head // model.cfg.n_heads).tolist()) for layer in layers]
    assert of_layer == [{i} for i in range(model.cfg.n_layers)]  # one after the other


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("basis", ["offset", "fixed"])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_of_firings_are_those_of_their_query_decomposed_by_itself(family, basis, processing):
    model = bridge(family, processing)
    space = HeadSpace(model, rope_basis=basis)
    layers = found(space, FiringRule(0.3, first_token=True))
    head, prompt, query, key = (joined(layers, name) for name in ("head", "prompt", "query", "key"))
    relative = joined_scores(layers, "query") * joined_scores(layers, "key")
    raw = joined_scores(layers, "query") * joined_scores(layers, "raw_key")
    others = {"offset": 0, "alone": 0}
    for i in range(0, len(head), 7):
        observed = space.observe(tokens()[prompt[i] : prompt[i] + 1], query[i : i + 1])
        contributions, _ = space.decompose(observed, key[i : i + 1])
        layer, h = divmod(int(head[i]), model.cfg.n_heads)
        own, seen = contributions[layer, h, 0].double(), observed.is_key[layer, 0]
        size = own.abs().max()
        torch.testing.assert_close(raw[i].double(), own[key[i]], rtol=1e-3, atol=float(1e-4 * size))
        torch.testing.assert_close(raw[i].sum(), own[key[i]].sum().float(), rtol=1e-3, atol=float(1e-4 * size))
        if seen.sum() == 1:
            assert relative[i].isnan().all()
            others["alone"] += 1
            continue
        alike = relative_attention(own, seen)[key[i]]
        torch.testing.assert_close(relative[i].double(), alike, rtol=1e-3, atol=float(1e-4 * size))
        attended = space.attended(observed, key[i : i + 1])
        for name in ("S", "direction", "raw_direction"):
            mine, theirs = (
                part.abs() for part in (joined_scores(layers, name)[i], getattr(attended, name)[layer, h, 0])
            )
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=float(2e-3 * theirs.max()))
        torch.testing.assert_close(joined_scores(layers, "attention")[i], attended.attention[layer, h, 0])
        others["offset"] += int(query[i] != key[i])
    assert others["offset"] > 0


def test_padding_does_not_fire_and_does_not_matter():
    space = HeadSpace(bridge("llama"))
    layers = found(space, RULES["a half"])
    assert (joined(layers, "query") < LENGTH[joined(layers, "prompt")]).all()
    other = tokens()
    for prompt, n in enumerate(LENGTH):
        other[prompt, n:] = 1
    again = found(space, RULES["a half"], other)
    for name in ("head", "prompt", "query", "key"):
        assert torch.equal(joined(again, name), joined(layers, name))
    torch.testing.assert_close(joined_scores(again, "key"), joined_scores(layers, "key"), rtol=1e-3, atol=1e-4)


def test_bases_of_single_heads_are_kept_up_to_a_size(monkeypatch):
    model = bridge("llama")
    rule = RULES["the first token as well"]
    plain = found(HeadSpace(model), rule)
    monkeypatch.setattr("svf_lightning.replay.firings._KEPT_BYTES", 1)
    space = HeadSpace(model)
    few = found(space, rule)
    most = max(len({(int(h), int(q - k)) for h, q, k in zip(b.head, b.query, b.key, strict=True)}) for b in few)
    assert len(space._firings._bases) <= most < sum(len(b.head) for b in few)
    torch.testing.assert_close(joined_scores(few, "S"), joined_scores(plain, "S"))


def test_the_prompts_own_query_alone_needs_its_position():
    space = HeadSpace(bridge("llama"))
    rule = RULES["the prompt's own query"]
    with pytest.raises(InputError, match=r"query=None.*every_query=False"):
        space.find_firings(tokens(), LENGTH, rule, [].append)
    with pytest.raises(InputError, match=r"query=.*positions 0\.\.10"):
        space.find_firings(tokens(), LENGTH, rule, [].append, query=torch.tensor([3, 11, 2]))


def test_scores_that_are_not_the_models_own_are_refused():
    model = bridge("llama")
    space = HeadSpace(model)
    space.A_q = space.A_q * 1.01
    with pytest.raises(Exception, match=r"rebuilt scores of head . in layer 0 are off by"):
        found(space, RULES["a half"])


@pytest.mark.parametrize("tau", [0, 1, 1.5, "1/n"])
def test_a_threshold_that_there_is_not_is_refused(tau):
    with pytest.raises(InputError, match=r"tau=.*\(0, 1\).*'1/\(n\+1\)'"):
        FiringRule(tau)


# ---- one basis for all offsets, from the command line


def test_the_fixed_basis_is_an_option_of_a_replay_that_its_rows_tell_and_the_default_stays_untold(
    typed, suite, tmp_path
):
    source = ("--data.source=svf_lightning.replay.FolderCheckpoints", f"--data.source.init_args.folder={suite}")
    few = ("--data.source.init_args.steps=[8]", "--data.n_prompts=6", "--trainer.logger=false", "--report=false")
    rows, identities = {}, {}
    for basis in ("offset", "fixed"):
        result = typed("replay", *source, *few, f"--model.rope_basis={basis}", f"--run_dir={tmp_path / basis}")
        assert result.returncode == 0, result.stderr
        rows[basis] = open_trajectory(tmp_path / basis).isel(step=0)
        identities[basis] = json.loads((tmp_path / basis / "identity.json").read_text())
    assert identities["fixed"].pop("rope_basis") == "fixed"
    assert identities["fixed"] == identities["offset"]  # which earlier versions would have written
    assert str(rows["fixed"]["rope_basis"].values) == "fixed"
    assert "rope_basis" not in rows["offset"]
    same, other = ("prompt/score", "prompt/attention", "firings/head/count"), ("prompt/sparseness", "contribution/mean")
    for name in same:
        np.testing.assert_allclose(rows["fixed"][name], rows["offset"][name], rtol=1e-3, atol=1e-4, err_msg=name)
    for name in other:
        assert not np.allclose(rows["fixed"][name], rows["offset"][name], rtol=1e-2, equal_nan=True), name
    refused = typed("replay", *source, *few, "--run_dir", tmp_path / "offset", "--model.rope_basis=fixed")
    assert refused.returncode == 2
    assert "rope_basis" in refused.stderr


def test_numbers_of_a_replay_in_the_fixed_basis_are_those_of_its_own_space(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    rows = replay(source, tmp_path, model=CheckpointReplay(rope_basis="fixed"))
    space = HeadSpace(make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval()), rope_basis="fixed")
    for i, prompt in enumerate(ReplayData(source, n_prompts=13).prompts[:4]):
        seen = space.observe(torch.tensor([prompt.tokens]), torch.tensor([prompt.query]))
        attended = space.attended(seen, torch.tensor([prompt.key]))
        expected = sparseness(attended.contributions[:, :, 0])
        np.testing.assert_allclose(rows["prompt/sparseness"].isel(step=0, prompt=i), expected, rtol=1e-3, atol=1e-4)


def test_an_unknown_basis_is_refused_by_the_replay():
    with pytest.raises(InputError, match="rope_basis='each'"):
        CheckpointReplay(rope_basis="each")
