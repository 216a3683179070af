"""Interventions: the same as a plain forward pass of transformers with edited weights."""

from dataclasses import replace

import pytest
import torch
from helpers.models import CONFIGS, bridge, random_model
from transformers import DynamicCache

from svf_lightning.errors import InputError
from svf_lightning.probe import Move
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.continuation import Continuation
from svf_lightning.replay.decompose import HeadSpace
from svf_lightning.replay.intervention import PromptInterventions, displacement
from svf_lightning.replay.prompts import PromptBatch

FAMILIES = list(CONFIGS)
QUERY, KEY = torch.tensor([10, 8, 6, 10]), torch.tensor([7, 5, 2, 9])
LAYER, HEAD = 1, 2


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 101, (4, 11), generator=torch.Generator().manual_seed(seed))


def interventions(model, seed: int = 1, **counterfactuals) -> PromptInterventions:
    space = HeadSpace(model)
    prompts = PromptBatch(tokens(seed), QUERY, KEY, torch.tensor([3, 4, 5, 6]), torch.tensor([7, 8, 9, 10]), QUERY + 1)
    prompts = replace(prompts, counterfactuals=counterfactuals)
    return PromptInterventions(space, space.observe(prompts.tokens, QUERY), prompts)


def orthonormal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_run_alone_is_the_last_token_of_the_whole_prompt(family, processing):
    model = bridge(family, processing)
    logits = model(tokens())[torch.arange(4), QUERY]
    again = Continuation(model, tokens(), QUERY)
    for _ in range(2):  # a run leaves nothing behind
        torch.testing.assert_close(again.run(lambda group: [])[0], logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_run_has_the_models_own_attention_and_no_divergence(family):
    model = bridge(family)
    again = interventions(model)
    outcome = again.run([])
    own = again.observed.pattern[:, :, torch.arange(4), KEY]
    torch.testing.assert_close(outcome.attention, own, rtol=1e-4, atol=1e-6)
    assert outcome.divergence.abs().max() < 1e-12


class Edited:
    """transformers alone, with the query or key weights of one head edited by hand: W' = W (1 + (factor - 1) d d^T)."""

    def __init__(self, family: str, side: str, directions: torch.Tensor, factor: float, heads: list[int]):
        self.family, self.side, self.directions, self.factor, self.heads = family, side, directions, factor, heads

    def weights(self, model):
        """Weight [H, D] and bias [H] of the heads, as views into the parameters of the layer."""
        config = model.config
        if self.family == "gpt2":
            attention, n = model.transformer.h[LAYER].attn, config.n_embd
            start = {"query": 0, "key": n}[self.side]
            H = n // config.n_head
            for head in self.heads:
                columns = slice(start + head * H, start + (head + 1) * H)
                yield attention.c_attn.weight.T[columns], attention.c_attn.bias[columns]
        elif self.family == "gpt_neox":
            attention = model.gpt_neox.layers[LAYER].attention
            H = config.hidden_size // config.num_attention_heads
            for head in self.heads:
                start = 3 * H * head + {"query": 0, "key": H}[self.side]
                both = attention.query_key_value
                yield both.weight[start : start + H], both.bias[start : start + H]
        else:
            attention = model.model.layers[LAYER].self_attn
            linear = {"query": attention.q_proj, "key": attention.k_proj}[self.side]
            H = config.head_dim if self.family != "qwen2" else config.hidden_size // config.num_attention_heads
            repeats = config.num_attention_heads // config.num_key_value_heads if self.side == "key" else 1
            for head in sorted({head // repeats for head in self.heads}):
                rows = slice(head * H, (head + 1) * H)
                yield linear.weight[rows], None if linear.bias is None else linear.bias[rows]

    @torch.no_grad()
    def logits(self, i: int) -> torch.Tensor:
        """Of prompt i: the earlier tokens as they were, but for the keys of the layer; the last with edited weights."""
        plain, edited = random_model(self.family), random_model(self.family)
        d = self.directions[i]
        for weight, bias in self.weights(edited):
            whole = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
            whole = whole + (self.factor - 1) * (whole @ d) @ d.T
            weight.copy_(whole[:, : weight.shape[1]])
            if bias is not None:
                bias.copy_(whole[:, -1])
        row, p = tokens()[i : i + 1], int(QUERY[i])
        caches = [DynamicCache(), DynamicCache()]
        for model, cache in zip((plain, edited), caches, strict=True):
            model.set_attn_implementation("eager")
            model(row[:, :p], past_key_values=cache, use_cache=True)
        past = [(layer.keys, layer.values) for layer in caches[0].layers]
        past[LAYER] = (caches[1].layers[LAYER].keys, past[LAYER][1])  # the layer reads what it read before
        return edited(row[:, p : p + 1], past_key_values=DynamicCache(past), use_cache=True).logits[0, -1]


@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taking_directions_out_is_a_forward_pass_with_edited_weights(family, side, factor):
    again = interventions(make_bridge(random_model(family), processing="raw"))
    space = again.space
    n_inputs = space.weights(LAYER, HEAD, side).shape[1]
    directions = orthonormal(4, n_inputs, 3)
    # query heads that share a key head: all of them, as there is one weight for them
    repeats = space.n_heads // space.bridge.W_K.shape[1] if side == "key" else 1
    heads = [head for head in range(space.n_heads) if head // repeats == HEAD // repeats]
    moves = [Move(LAYER * space.n_heads + head, side, directions, factor) for head in heads]
    found, untouched = again.run(moves), again.run([])
    edited = Edited(family, side, directions, factor, heads)
    correct, wrong = again.prompts.correct, again.prompts.wrong
    for i in range(4):
        logits = edited.logits(i)
        expected = float(logits[correct[i]] - logits[wrong[i]])
        assert float(found.logit_difference[i]) == pytest.approx(expected, abs=5e-5)
        before = untouched.logit_difference[i]
        plain = Edited(family, side, directions, 1.0, heads).logits(i)
        assert float(before) == pytest.approx(float(plain[correct[i]] - plain[wrong[i]]), abs=5e-5)
        kl = float((plain.softmax(-1) * (plain.log_softmax(-1) - logits.log_softmax(-1))).sum())
        assert float(found.divergence[i]) == pytest.approx(kl, rel=1e-2, abs=1e-6)
    assert (found.logit_difference - untouched.logit_difference).abs().max() > 1e-4  # the edit does something


@pytest.mark.parametrize("processing", ["raw", "folded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["query", "key"])
def test_singular_vectors_take_the_scores_apart(family, processing, side):
    """u_k out of the query (or, without rotation, v_k out of the keys) takes c_jk off the score of every key."""
    again = interventions(bridge(family, processing))
    space, head = again.space, LAYER * again.space.n_heads + HEAD
    vectors = again.singular_vectors(head, side)
    identity = torch.eye(vectors.shape[-1]).expand(4, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-4)
    contributions = space.decompose(again.observed, KEY).contributions[LAYER, HEAD]  # [prompt, key, R]
    cap = space.caps[LAYER]
    seen = {}

    def keep(scores, hook):
        position = scores.shape[-1] - 1
        for row, i in enumerate(i for i in range(4) if int(QUERY[i]) == position):
            seen[i] = scores[row, HEAD, 0]

    scores = {}
    for name, moves in (("before", []), ("after", [Move(head, side, vectors[..., 1:2])])):
        with again.space.bridge.hooks(fwd_hooks=[(f"blocks.{LAYER}.attn.hook_pattern", keep)]):
            again.run(moves)
        scores[name] = dict(seen)
    for i in range(4):
        n = int(QUERY[i]) + 1
        visible = again.observed.is_key[LAYER, i, :n]
        # patterns give differences of scores, capped where the model caps them
        logs = {name: values[i].log() for name, values in scores.items()}
        if cap is not None or (side == "key" and again.observed.rotation is not None):
            # at the key's own offset v_k belongs to u_k; elsewhere it does not, and the sum is checked above
            continue
        change = (logs["after"] - logs["before"])[visible]
        expected = -contributions[i, :n, 1][visible]
        torch.testing.assert_close(change - change.mean(), expected - expected.mean(), rtol=1e-3, atol=1e-4)


def test_a_move_goes_as_far_as_another_one_would():
    again = interventions(bridge("gpt2"))
    x = again.reads("", [LAYER])[LAYER]
    n_inputs = x.shape[-1]
    reference, other = orthonormal(4, n_inputs, 2, seed=1), orthonormal(4, n_inputs, 5, seed=2)

    def length(move):
        return displacement([move], torch.arange(4), x[None], None)[0].norm(dim=-1)

    wanted = (x @ reference).norm(dim=-1)
    torch.testing.assert_close(length(Move(0, "query", reference)), wanted)
    torch.testing.assert_close(length(Move(0, "query", other, as_far_as=reference)), wanted)
    torch.testing.assert_close(length(Move(0, "query", other, 3.0, as_far_as=reference)), 2 * wanted)


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patching_everything_that_a_head_reads_gives_it_the_scores_of_the_other_prompt(family, side):
    """With all directions taken from the other prompt at both sides, the head attends as it does there."""
    other = tokens(2)
    model = bridge(family)
    again, there = interventions(model, abc=other), interventions(model, seed=2)
    head = LAYER * again.space.n_heads + HEAD
    whole = torch.eye(again.space.weights(LAYER, HEAD, side).shape[1]).expand(4, -1, -1)
    both = again.run([Move(head, "query", whole, source="abc"), Move(head, "key", whole, source="abc")])
    expected = there.run([]).attention[LAYER, HEAD]
    torch.testing.assert_close(both.attention[LAYER, HEAD], expected, rtol=2e-3, atol=1e-5)
    one = again.run([Move(head, side, whole, source="abc")])
    assert (one.attention[LAYER, HEAD] - expected).abs().max() > 1e-3
    assert again.sources == ["abc"]


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_variants_that_run_together_are_as_if_each_ran_alone(family, monkeypatch):
    again = interventions(bridge(family), abc=tokens(2))
    n_inputs = again.space.weights(0, 0, "query").shape[1]
    few, many = orthonormal(4, n_inputs, 2), orthonormal(4, n_inputs, 5, seed=3)
    factors = torch.tensor([0.0, 2.0, 0.5, -1.0])
    variants = [
        [Move(1, "query", few), Move(1, "key", many, source="abc")],
        [],
        [Move(1, "query", many, factors), Move(HEAD + again.space.n_heads, "query", few, 2.0)],
        [Move(1, "query", many, as_far_as=few), Move(1, "query", few, source="abc")],
    ]
    together = again.run_each(variants)
    monkeypatch.setattr("svf_lightning.replay.intervention._ROWS", 1)
    for outcomes in (again.run_each(variants), [again.run(moves) for moves in variants]):
        for one, other in zip(together, outcomes, strict=True):
            for mine, theirs in zip(one, other, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert (together[0].attention - together[1].attention).abs().max() > 1e-3


def test_random_directions_have_the_covariance_of_what_the_head_reads():
    again = interventions(bridge("gpt_neox"))
    head = 2 * again.space.n_heads
    x = again.reads("", [2])[2]
    tokens_seen = torch.cat([x[i, 1 : int(QUERY[i]) + 1] for i in range(4)])
    covariance = torch.cov(tokens_seen.double().T)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([again.residual_draws(head, 1, generator) for _ in range(3000)]).squeeze(-1).double()
    assert (draws.norm(dim=-1) - 1).abs().max() < 1e-5
    # unit vectors of N(0, C): their second moments have the eigenvectors of C, in the same order
    values, vectors = torch.linalg.eigh(covariance)
    moments = (vectors.T @ (draws.T @ draws / len(draws)) @ vectors).diagonal()
    assert moments.argsort().tolist()[-3:] == values.argsort().tolist()[-3:]
    assert moments[-1] > 5 * moments[: len(moments) // 2].mean()
    assert draws[:, -1].abs().max() < 1e-5  # the bias coordinate does not vary


def test_an_unknown_source_is_an_input_error():
    again = interventions(bridge("gpt2"))
    with pytest.raises(InputError, match="source"):
        again.run([Move(0, "query", orthonormal(4, 31, 1), source="abc")])
