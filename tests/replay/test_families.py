"""Models of all families, as benchmarks/families.py has them: exact, or refused with a reason; never a crash."""

import numpy as np
import pytest
import torch
from helpers.replays import replay
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.families import EXACT, FAMILIES, KEY, QUERY, build, decomposed, prompts
from svf_lightning.callbacks import (
    AttentionOverWords,
    AttentionSparsity,
    DirectionIntervention,
    Firings,
    Unwhitening,
)
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import FiringBatch, FiringRule, Move, Probe
from svf_lightning.replay import HeadSpace, ModelCheckpoints, decompose_attention
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.intervention import PromptInterventions
from svf_lightning.replay.prompts import PromptBatch

NAMED = {family.name: family for family in FAMILIES}
# what the message says is in the way
REFUSED = {
    "OLMo, clipped": r"clipped to 0\.5 on these prompts \(of the keys, \d+\.\d+% of the components\)",
    **dict.fromkeys(("DeepSeek-V2", "DeepSeek-V3", "GLM-4 MoE Lite", "Youtu"), r"multi-head latent attention \(MLA\)"),
    "JetMoe": "attention of another kind",
    "HRM-Text": "no stack of",
    **dict.fromkeys(("Mamba", "Mamba-2", "RWKV"), "no layer has attention"),
}
MEASURED = [name for name in NAMED if name not in REFUSED]
# one for each way of scoring that is not that of tests/helpers/models.py
WAYS = (
    "GPT-2 (Stanford)", "GPT-2 without scale", "GPT-1", "GPT-Neo", "BLOOM", "MPT", "Falcon-RW", "GPT-J", "Falcon-40B",
    "Llama-4", "SmolLM-3", "GPT-OSS", "ModernBERT decoder", "Cohere (Command R+)", "Gemma-3, one key head", "HunYuan",
    "Laguna", "nanochat", "OLMo-2", "Phi with QK-norm", "Qwen3", "StableLM-2 12B", "Falcon-H1", "Jamba", "Nemotron-H",
    "RecurrentGemma",
)  # fmt: skip
Q, K, BATCH = torch.tensor(QUERY), torch.tensor(KEY), torch.arange(3)
LENGTH = Q + 1


# each family in one of the two modes; in both with -m slow
MODES = [
    pytest.param(name, mode, marks=[] if (i + j) % 2 == 0 else [pytest.mark.slow])
    for i, name in enumerate(NAMED)
    for j, mode in enumerate(("raw", "folded"))
]


@pytest.mark.parametrize(("name", "processing"), MODES)
def test_sums_over_singular_pairs_are_the_models_own_scores_or_one_line_says_why_not(name, processing):
    result = decomposed(NAMED[name], processing)
    if name in REFUSED:
        assert result.error is None
        assert result.refused
        with pytest.raises(InputError, match=REFUSED[name]) as error:
            decompose_attention(make_bridge(build(NAMED[name]), processing=processing), prompts(), Q, K)
        assert "\n" not in str(error.value)
        assert "Allowed: " in str(error.value)
        assert "Fix: " in str(error.value)
    else:
        assert result.reason == ""
        assert result.error <= EXACT


def test_most_families_are_measured():
    assert len(MEASURED) >= 85
    assert len(MEASURED) + len(REFUSED) == len(FAMILIES) == len(NAMED)


# ---- against dense matrices, from the definition


def _rms(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize(("name", "gain_is_added_to_one"), [("Qwen3", False), ("Gemma-3", True)])
def test_qk_norm_folds_gains_and_leaves_two_scalars_of_the_tokens(name, gain_is_added_to_one):
    """Omega_D = W_Q^T diag(g_q) R_D diag(g_k) W_K: its dense SVD and the scalars give the contributions."""
    model = build(NAMED[name])
    bridge = make_bridge(model, processing="raw")
    space = HeadSpace(bridge)
    found = space.decompose(space.observe(prompts(), Q), K)
    layer, prompt = 1, 1  # of Gemma-3, one that sees all keys
    attention = bridge.original_model.model.layers[layer].self_attn.original_component
    with torch.no_grad():
        _, cache = bridge.run_with_cache(prompts())
    x = cache[f"blocks.{layer}.attn.hook_in"][prompt].double()
    cos, sin = (cache[f"blocks.{layer}.attn.hook_{part}"][0].double() for part in ("cos", "sin"))
    H = space.d_head
    sides = {}
    for side, position in (("q", int(Q[prompt])), ("k", int(K[prompt]))):
        # the plain module: its weights, gains and eps are named as transformers has them
        plain = build(NAMED[name]).model.layers[layer].self_attn
        W = getattr(plain, f"{side}_proj").weight.double().view(-1, H, x.shape[1])
        norm = getattr(plain, f"{side}_norm")
        gain = norm.weight.double() + gain_is_added_to_one
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        s = 1 / ((W @ x.T).square().mean(1) + eps).sqrt()  # [head, token]
        rows = (gain[:, None] * W).mT[None]  # [1, head, D, H]
        turned = apply_rotary_pos_emb(rows, rows, *(p[position].expand(1, x.shape[1], -1) for p in (cos, sin)))[0][0]
        sides[side] = (turned.mT, s, attention.scaling)
    for head in range(space.n_heads):
        (W_q, s_q, scale), (W_k, s_k, _) = sides["q"], sides["k"]
        group = head // space.repeats
        Omega = (W_q[head].T @ W_k[group] * scale).detach()
        U, S, Vh = torch.linalg.svd(Omega)
        at, key = int(Q[prompt]), int(K[prompt])
        c = (x[at] @ U * S * (Vh @ x[key])) * s_q[head, at] * s_k[group, key]
        own = found.contributions[layer, head, prompt, key]
        np.testing.assert_allclose(own, c[:H].detach(), rtol=1e-3, atol=1e-4 * float(c.abs().max()))


def test_biases_of_a_norm_of_queries_and_keys_are_a_coordinate_of_their_own():
    """LayerNorm on q and k: (s W' x + c) with a centring matrix in W', written out head by head."""
    model = build(NAMED["Phi with QK-norm"])
    bridge = make_bridge(model, processing="raw")
    heads = AttentionHeads.from_bridge(bridge)
    assert heads.n_constants == 2  # the biases of the projection carry the token's scalar, those of the norm do not
    assert heads.factors()[0].shape[-1] == 40 + 2
    plain = build(NAMED["Phi with QK-norm"]).model.layers[1].self_attn
    norm = plain.q_layernorm
    x = torch.randn(40, dtype=torch.float64)
    q = (plain.q_proj.weight.double() @ x + plain.q_proj.bias.double()).view(4, 10)
    expected = torch.nn.functional.layer_norm(q, (10,), norm.weight.double(), norm.bias.double(), norm.eps)
    s = (q.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()  # [head, 1]
    whole = heads.factors()[0][1].double()  # [head, H, D + 2]
    token = torch.cat([x.expand(4, -1) * s, s, torch.ones(4, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(torch.einsum("hid,hd->hi", whole, token), expected, rtol=1e-5, atol=1e-6)


def test_a_scale_of_its_own_of_each_layer_is_in_the_form():
    bridge = make_bridge(build(NAMED["GPT-2 (Stanford)"]), processing="raw")
    heads = AttentionHeads.from_bridge(bridge)
    for layer in range(4):
        Omega = (heads.W_Q[layer, 1].T @ heads.W_K[layer, 1]) * heads.scale
        own = bridge.W_Q[layer, 1] @ bridge.W_K[layer, 1].T / (10**0.5 * (layer + 1))
        torch.testing.assert_close(Omega, own)


# ---- a term of positions


@pytest.mark.parametrize("name", ["BLOOM", "MPT", "Falcon-RW"])
def test_alibi_stands_beside_the_singular_pairs(name):
    bridge = make_bridge(build(NAMED[name]), processing="raw")
    space = HeadSpace(bridge)
    observed = space.observe(prompts(), Q)
    found = space.decompose(observed, K)
    torch.testing.assert_close(found.contributions.sum(-1) + found.position, found.scores, rtol=1e-5, atol=1e-5)
    # linear in the distance, with the slopes 2^-2, 2^-4, ... of four heads (Press et al. 2022), in every layer alike
    slopes = 2.0 ** -(2 * torch.arange(1, 5, dtype=torch.float32))
    scale = space.heads.scale if name == "Falcon-RW" else 1.0
    for prompt, query in enumerate(QUERY):
        term = found.position[:, :, prompt, : query + 1]
        expected = (slopes * scale)[:, None] * torch.arange(query + 1)
        difference = term - term[..., :1] - expected
        assert difference.abs().max() < 0.01 * expected.max()  # Falcon has its slopes in bfloat16
    contributions, scores = decompose_attention(bridge, prompts(), Q, K)  # as earlier versions gave it
    assert torch.equal(scores, found.scores)
    assert torch.equal(contributions, found.contributions)


def test_the_share_of_positions_is_that_of_the_relative_scores():
    space = HeadSpace(make_bridge(build(NAMED["BLOOM"]), processing="raw"))
    observed = space.observe(prompts(), Q)
    found = space.decompose(observed, K)
    metric = AttentionSparsity(n_draws=2, keep_prompts=False)
    probe = Probe(0, heads=space.heads, scores=space.attended(observed, K), batch_dims=("layer", "head"))
    metric.observe(probe)
    measured = metric.measure(probe)
    expected = torch.zeros(4, 4, 3, 2)
    for prompt, (query, key) in enumerate(zip(QUERY, KEY, strict=True)):
        others = [j for j in range(query + 1) if j != key]
        for i, values in enumerate((found.position, found.contributions.sum(-1))):
            of = values[:, :, prompt]
            expected[:, :, prompt, i] = of[..., key] - of[..., others].mean(-1)
    size = expected.abs()
    share = (size[..., 0] / size.sum(-1)).mean(-1)
    torch.testing.assert_close(measured["sad/position_share"][0], share, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured["sad/score_of_position"][0], expected[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    assert 0 < float(share.min()) < float(share.max()) < 1


# ---- what the rest of the package does with heads


def interventions(name, processing="raw", **counterfactuals):
    space = HeadSpace(make_bridge(build(NAMED[name]), processing=processing))
    batch = PromptBatch(
        prompts(), Q, K, torch.tensor([3, 4, 5]), torch.tensor([7, 8, 9]), LENGTH, counterfactuals=counterfactuals
    )
    return PromptInterventions(space, space.observe(batch.tokens, Q), batch)


@pytest.mark.parametrize("name", WAYS)
def test_a_run_again_is_the_models_own_and_a_singular_vector_takes_its_contribution_off(name):
    again = interventions(name)
    space, observed = again.space, again.observed
    own = observed.pattern[:, :, BATCH, K]
    torch.testing.assert_close(again.run([]).attention, own, rtol=1e-3, atol=1e-5)
    layer, head = space.n_layers - 1, 1
    flat = layer * space.n_heads + head
    vectors = again.singular_vectors(flat, "query")
    moved = again.run([Move(flat, "query", vectors[..., 1:2])]).attention[layer, head]
    cap = space.caps[layer]
    found = space.decompose(observed, K)
    before, c = found.scores[layer, head].double(), found.contributions[layer, head, ..., 1].double()
    weights = []
    for scores in (before, before - c):
        capped = scores if cap is None else cap * torch.tanh(scores / cap)
        weights.append(capped.masked_fill(~observed.is_key[layer], -torch.inf).exp())
    # an attention sink takes part in the softmax and is no key: what is left for it does not move
    sink = weights[0].sum(-1) * (1 / observed.pattern[layer, head].double().sum(-1) - 1)
    expected = (weights[1][BATCH, K] / (weights[1].sum(-1) + sink)).float()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Qwen3", "OLMo-2", "Phi with QK-norm", "HunYuan", "BLOOM", "Nemotron-H", "Llama-4"])
def test_patching_everything_that_a_head_reads_gives_it_the_scores_of_the_other_prompt(name):
    other = prompts().flip(0)
    again = interventions(name, abc=other)
    layer, head = again.space.n_layers - 1, 1
    flat = layer * again.space.n_heads + head
    whole = torch.eye(again.space.weights(layer, head, "query").shape[1]).expand(3, -1, -1)
    sides = [Move(flat, side, whole, source="abc") for side in ("query", "key")]
    found = again.run(sides).attention[layer, head]
    expected = again.space.observe(other, Q).pattern[layer, head, BATCH, K]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("processing", ["raw", pytest.param("folded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WAYS)
def test_firings_are_decomposed_as_their_queries_by_themselves(name, processing):
    space = HeadSpace(make_bridge(build(NAMED[name]), processing=processing))
    batches: list[FiringBatch] = []
    space.find_firings(prompts(), LENGTH, FiringRule(0.2, first_token=True), batches.append)
    n = 0
    for batch in batches:
        for i in range(0, len(batch.head), 23):
            prompt, query, key = int(batch.prompt[i]), batch.query[i : i + 1], batch.key[i : i + 1]
            layer, head = divmod(int(batch.head[i]), space.n_heads)
            attended = space.attended(space.observe(prompts()[prompt : prompt + 1], query), key)
            own = (attended.query * attended.raw_key)[layer, head, 0]
            c = batch.scores.query[i] * batch.scores.raw_key[i]
            torch.testing.assert_close(c, own, rtol=1e-3, atol=float(2e-4 * own.abs().max()))
            if attended.position is not None:
                term = attended.raw_position[layer, head, 0]
                torch.testing.assert_close(batch.scores.raw_position[i], term, rtol=1e-4, atol=1e-5)
            n += 1
    assert n > 3


@pytest.mark.parametrize("basis", ["offset", "fixed"])
@pytest.mark.parametrize("biases", ["appended", "separate", "pseudo_inverse"])
@pytest.mark.parametrize("name", ["Qwen3", "HunYuan", "Phi with QK-norm", "Cohere (Command R+)", "GPT-J", "BLOOM"])
def test_every_convention_gives_the_same_scores(name, biases, basis):
    bridge = make_bridge(build(NAMED[name]), processing="raw")
    needs_range = {
        "Phi with QK-norm": biases == "pseudo_inverse" or (biases == "separate" and basis == "fixed"),
        "Cohere (Command R+)": basis == "fixed",  # without biases, which would give the dimension back
    }
    if needs_range.get(name, False):
        # LayerNorm on q takes a dimension from W_Q, so what is turned or moved may leave its range
        with pytest.raises(InputError, match="heads of full rank"):
            HeadSpace(bridge, rope_basis=basis, biases=biases)
        return
    space = HeadSpace(bridge, rope_basis=basis, biases=biases)
    observed = space.observe(prompts(), Q)
    scores = space.decompose(observed, K).scores
    expected = HeadSpace(bridge).decompose(observed if biases == "appended" else _seen(bridge), K).scores
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=float(1e-4 * expected.abs().max()))


def _seen(bridge):
    return HeadSpace(bridge).observe(prompts(), Q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Qwen3", "Cohere (Command R+)", "BLOOM", "GPT-Neo", "GPT-J", "OPT", "Nemotron-H"])
def test_half_precision_is_off_by_a_few_roundings(name, dtype):
    space = HeadSpace(make_bridge(build(NAMED[name], spread=0.1).to(dtype), processing="raw"))
    attended = space.attended(space.observe(prompts(), Q), K)
    assert float(attended.error.max()) / torch.finfo(dtype).eps < 8


def test_a_bridge_of_a_family_that_the_library_does_not_know_leaves_the_model_as_it_is():
    model = build(NAMED["Falcon-40B"])
    before = model(prompts(), use_cache=False).logits
    bridge = make_bridge(model, processing="folded")
    torch.testing.assert_close(bridge.run_with_hooks(prompts()), before, rtol=1e-4, atol=1e-4)
    assert bridge.original_model is model


# ---- whole replays


@pytest.mark.parametrize("name", ["Jamba", "Gemma-3, one key head", "BLOOM", "Falcon-40B"])
def test_every_metric_of_a_replay_measures_it(name, suite, tmp_path):
    """Hybrids, QK-norm, ALiBi, and a model that TransformerLens does not take."""
    tokenizer = AutoTokenizer.from_pretrained(suite / "step0")
    family = NAMED[name]
    options = {**family.options, "vocab_size": len(tokenizer)}
    models = {step: build(family._replace(options=options), seed=step) for step in (0, 8)}
    callbacks = [Firings(), DirectionIntervention(numbers=(1,)), Unwhitening(), AttentionOverWords()]
    rows = replay(ModelCheckpoints(models, tokenizer), tmp_path, callbacks=callbacks, n_prompts=16)
    layers = [1, 3] if name == "Jamba" else [0, 1, 2, 3]
    assert rows.sizes["layer"] == len(layers)
    assert ("block" in rows.coords or "block" in rows) == (name == "Jamba")
    if name == "Jamba":
        assert rows["block"].values.ravel()[: len(layers)].tolist() == layers
    assert float(rows["sad/score_error"].max()) < 1e-4
    assert ("sad/position_share" in rows) == (name == "BLOOM")
    measured = [name for name in rows.data_vars if str(name).startswith(("firings/", "directions/", "unwhitening/"))]
    assert len(measured) > 20
