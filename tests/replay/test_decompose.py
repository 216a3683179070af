import numpy as np
import pytest
import torch
from helpers.models import CONFIGS, bridge, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import relative_attention
from svf_lightning.replay import decompose_attention
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.decompose import HeadSpace

FAMILIES = list(CONFIGS)
BOTH = ("raw", "folded")
# lengths 11, 9, 7 and 11: prompts of several lengths, and two of the same offset
QUERY, KEY = torch.tensor([10, 8, 6, 10]), torch.tensor([7, 5, 2, 9])
BATCH = torch.arange(4)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 101, (4, 11), generator=torch.Generator().manual_seed(seed))


def cached(model, what: str) -> torch.Tensor:
    """What the model itself computed [layer, batch, ...]."""
    _, cache = model.run_with_cache(tokens())
    return torch.stack([cache[f"blocks.{layer}.{what}"] for layer in range(model.cfg.n_layers)])


def capped(model, scores: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.blocks[0].attn.original_component, "attn_logit_softcapping", None)
    return scores if cap is None else cap * torch.tanh(scores / cap)


@pytest.mark.parametrize("processing", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_add_up_to_the_models_own_scores(family, processing):
    model = bridge(family, processing)
    contributions, scores = decompose_attention(model, tokens(), QUERY, KEY)
    own = cached(model, "attn.hook_attn_scores")[:, BATCH, :, QUERY].permute(1, 2, 0, 3)
    seen = cached(model, "attn.hook_pattern")[:, BATCH, :, QUERY].permute(1, 2, 0, 3) > 0
    assert contributions.shape == (*scores.shape, model.cfg.d_head)
    torch.testing.assert_close(contributions.sum(-1), scores, rtol=1e-5, atol=1e-5)
    difference = (capped(model, scores) - own)[seen].abs().max()
    assert difference < 1e-5 * scores.abs().max()
    assert (contributions[~seen] == 0).all()
    assert contributions[seen].abs().amax() > scores.abs().max() / 10


def weights(model, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_Q and W_K [H, D'] of one head, with biases as a last column."""
    group = model.cfg.n_heads // model.W_K.shape[1]
    W_Q, W_K = model.W_Q[layer, head].T, model.W_K[layer, head // group].T
    attention = model.blocks[layer].attn
    if attention.b_Q is not None:
        W_Q = torch.cat([W_Q, attention.b_Q[head][:, None]], 1)
        W_K = torch.cat([W_K, attention.b_K[head // group][:, None]], 1)
    return W_Q, W_K


def dense_form(model, layer: int, head: int, query: int, key: int) -> np.ndarray:
    """Omega [D', D'] of one head for one pair of positions, from the weights and the model's own rotation."""
    W_Q, W_K = weights(model, layer, head)
    attention = model.blocks[layer].attn
    if model.cfg.positional_embedding_type == "rotary":
        cos, sin = (cached(model, f"attn.hook_{part}")[layer, 0] for part in ("cos", "sin"))
        n = cos.shape[-1]
        turned = []
        for W, position in ((W_Q, query), (W_K, key)):
            rows = W.T[None, None, :, :n]  # columns of W are vectors of the head
            at = [part[position].expand(1, rows.shape[2], n) for part in (cos, sin)]
            turned.append(torch.cat([apply_rotary_pos_emb(rows, rows, *at)[0][0, 0], W.T[:, n:]], 1).T)
        W_Q, W_K = turned
    scale = attention.original_component.scaling
    return (W_Q.T.double() @ W_K.double() * scale).detach().numpy()


@pytest.mark.parametrize("processing", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_of_the_attended_key_are_those_of_a_dense_svd(family, processing):
    model = bridge(family, processing)
    contributions, _ = decompose_attention(model, tokens(), QUERY, KEY)
    x = cached(model, "attn.hook_in")
    layer, head, prompt = 1, 3, 2
    if model.blocks[0].attn.b_Q is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    r, s = (x[layer, prompt, at[prompt]].double().numpy() for at in (QUERY, KEY))
    U, S, Vt = np.linalg.svd(dense_form(model, layer, head, int(QUERY[prompt]), int(KEY[prompt])))
    rank = model.cfg.d_head
    expected = (r @ U)[:rank] * S[:rank] * (Vt @ s)[:rank]
    assert S[rank:].max(initial=0) < 1e-6 * S[0]
    found = contributions[layer, head, prompt, KEY[prompt]].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_attended_scores_are_the_contributions_relative_to_the_other_keys(family):
    model = bridge(family)
    space = HeadSpace(model)
    observed = space.observe(tokens(), QUERY)
    attended = space.attended(observed, KEY)
    contributions, _ = space.decompose(observed, KEY)
    seen = observed.is_key[:, None].expand(-1, space.n_heads, -1, -1)
    expected = relative_attention(contributions.double(), seen)[:, :, BATCH, KEY].float()
    torch.testing.assert_close(attended.contributions, expected, rtol=1e-4, atol=1e-5)
    pattern = cached(model, "attn.hook_pattern")[:, BATCH, :, QUERY, KEY].permute(1, 2, 0)
    torch.testing.assert_close(attended.attention, pattern)
    assert (attended.error < 1e-5).all()


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_coordinates_are_those_of_a_dense_svd(family):
    model = bridge(family)
    space = HeadSpace(model)
    attended = space.attended(space.observe(tokens(), QUERY), KEY)
    layer, head, prompt = 2, 1, 0
    x = cached(model, "attn.hook_in")[layer, prompt]
    x = torch.cat([x, torch.ones_like(x[:, :1])], -1).double().numpy()
    query, key = int(QUERY[prompt]), int(KEY[prompt])
    others = [j for j in range(query + 1) if j != key]
    U, S, Vt = np.linalg.svd(dense_form(model, layer, head, query, key))
    rank = model.cfg.d_head
    at = (layer, head, prompt)
    np.testing.assert_allclose(attended.S[at], S[:rank], rtol=1e-5)
    sign = np.sign((x[query] @ U)[:rank] * attended.query[at].numpy())
    np.testing.assert_allclose(attended.query[at].numpy() * sign, (x[query] @ U)[:rank], atol=1e-4)
    np.testing.assert_allclose(
        attended.direction[at].numpy() * sign, (Vt @ (x[key] - x[others].mean(0)))[:rank], atol=2e-3
    )  # the key's coordinates come from its key vector, through a pseudo-inverse


def test_the_query_may_be_anywhere_and_what_comes_after_it_does_not_matter():
    model = bridge("gpt_neox")
    first, _ = decompose_attention(model, tokens(), QUERY, KEY)
    padded = tokens()
    for prompt, query in enumerate(QUERY):
        padded[prompt, query + 1 :] = 1
    second, _ = decompose_attention(model, padded, QUERY, KEY)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    alone, scores = decompose_attention(model, tokens()[2:3, :7], QUERY[2:3], KEY[2:3])
    torch.testing.assert_close(first[:, :, 2, :7].sum(-1), scores[:, :, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(first[:, :, 2, :7].abs(), alone[:, :, 0].abs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("processing", BOTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_visible_keys_are_those_with_attention(family, processing):
    model = bridge(family, processing)
    seen = HeadSpace(model).observe(tokens(), QUERY).is_key
    pattern = cached(model, "attn.hook_pattern")[:, BATCH, :, QUERY].permute(1, 0, 2, 3)
    assert ((pattern > 0).any(2) == seen).all()
    if family == "gemma2":
        assert seen[0, 0].sum() == 5  # the sliding window
        assert seen[1, 0].sum() == 11


def test_a_key_outside_a_sliding_window_has_no_relative_score():
    space = HeadSpace(bridge("gemma2"))
    key = torch.tensor([3, 5, 2, 9])
    attended = space.attended(space.observe(tokens(), QUERY), key)
    assert attended.contributions[0, :, 0].isnan().all()
    assert attended.contributions[1, :, 0].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_a_bridge_have_the_singular_values_of_the_dense_form(family):
    model = bridge(family)
    heads = AttentionHeads.from_bridge(model)
    S = heads.svd().S
    assert heads.W_Q.shape[:2] == (model.cfg.n_layers, model.cfg.n_heads)
    for layer, head in ((0, 0), (2, 3)):
        dense = np.linalg.svd(dense_form(model, layer, head, 0, 0), compute_uv=False)[: model.cfg.d_head]
        np.testing.assert_allclose(S[layer, head], dense, rtol=1e-4, atol=1e-5 * dense[0])


def test_a_head_of_lower_rank_is_decomposed_exactly():
    model = random_model("gpt_neox")
    with torch.no_grad():
        qkv = model.gpt_neox.layers[1].attention.query_key_value
        width = model.config.hidden_size // model.config.num_attention_heads
        qkv.weight.view(5, 3, width, -1)[2, 0, :3] = 0  # three rows of a query, all of a key
        qkv.bias.view(5, 3, width)[2, 0, :3] = 0
        qkv.weight.view(5, 3, width, -1)[4, 1] = 0
        qkv.bias.view(5, 3, width)[4, 1] = 0
    space = HeadSpace(make_bridge(model))
    observed = space.observe(tokens(), QUERY)
    attended = space.attended(observed, KEY)
    assert (attended.S[1, 2, :, 5:] < 1e-5).all()
    assert attended.contributions.isfinite().all()
    assert attended.direction.isfinite().all()
    assert (attended.contributions[1, 4].abs() < 1e-6).all()
    own = observed.scores - observed.scores.gather(-1, KEY[None, None, :, None].expand(3, 5, -1, -1))
    seen = observed.is_key[:, None].expand_as(own)
    others = own.masked_fill(~seen, 0).sum(-1) / (seen.sum(-1) - 1)
    torch.testing.assert_close(attended.contributions.sum(-1), -others, rtol=1e-4, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_nothing_of_size_heads_times_d_model_squared_is_allocated():
    config = CONFIGS["gpt2"]()
    config.n_embd, config.n_head, config.n_inner, config.vocab_size = 256, 32, 8, 101
    model = make_bridge(AutoModelForCausalLM.from_config(config).eval())
    dense = 3 * 32 * 256**2
    with _Largest() as largest:
        space = HeadSpace(model)
        space.attended(space.observe(tokens(), QUERY), KEY)
        AttentionHeads.from_bridge(model).svd()
    assert 0 < largest.numel <= dense / 25


def test_offsets_share_a_decomposition_and_few_are_kept():
    space = HeadSpace(bridge("llama"))
    observed = space.observe(tokens(), QUERY)
    space.attended(observed, KEY)
    assert sorted(space._bases) == [(0, -4), (0, -3), (0, -1)]  # the first two prompts have the same offset
    for key in range(11):
        space.svd(observed, 10, key)
    assert len(space._bases) == 8


def test_models_whose_scores_are_no_bilinear_form_are_refused():
    sizes = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make_bridge(
        AutoModelForCausalLM.from_config(
            Qwen3Config(**sizes, num_key_value_heads=2, intermediate_size=32, head_dim=6)
        ).eval()
    )
    space = HeadSpace(model)
    with torch.no_grad():
        model.blocks[1].attn.original_component.q_norm.weight[3] *= 2  # no longer what was read
    with pytest.raises(InputError, match=r"not the bilinear form.*Allowed"):
        space.decompose(space.observe(tokens(), QUERY), KEY)
    HeadSpace(model)
    model.blocks[1].attn.original_component.q_norm = torch.nn.Tanh()
    with pytest.raises(InputError, match="layer 1 normalizes in a way that is neither LayerNorm nor RMSNorm"):
        HeadSpace(model)


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("query", "key", "message"),
    [([11, 8, 6, 10], [7, 5, 2, 9], "query"), ([10, 8, 6, 10], [7, 9, 2, 9], "key"), ([10, 8], [7, 5], "query.shape")],
)
def test_positions_that_do_not_fit_are_refused(query, key, message):
    with pytest.raises(InputError, match=message):
        decompose_attention(bridge("gpt2"), tokens(), torch.tensor(query), torch.tensor(key))


def test_an_unknown_processing_is_refused():
    with pytest.raises(InputError, match="'folded' or 'raw'"):
        make_bridge(random_model("gpt2"), processing="fold")


# ---- one basis for all offsets


ROTARY = [family for family in FAMILIES if family != "gpt2"]


def turned(model, layer: int, W: torch.Tensor, position: int) -> np.ndarray:
    """M_p W with the model's own rotation of a position; columns of W [H, D'] are vectors of the head."""
    cos, sin = (cached(model, f"attn.hook_{part}")[layer, 0, position] for part in ("cos", "sin"))
    n = cos.shape[-1]
    rows = W.T[None, None, :, :n]
    at = [part.expand(1, rows.shape[2], n) for part in (cos, sin)]
    return torch.cat([apply_rotary_pos_emb(rows, rows, *at)[0][0, 0], W.T[:, n:]], 1).T.double().detach().numpy()


@pytest.mark.parametrize("processing", BOTH)
@pytest.mark.parametrize("family", ROTARY)
def test_in_a_fixed_basis_contributions_are_those_of_tokens_rotated_through_dense_pseudo_inverses(family, processing):
    model = bridge(family, processing)
    space = HeadSpace(model, rope_basis="fixed")
    observed = space.observe(tokens(), QUERY)
    contributions, scores = space.decompose(observed, KEY)
    own = cached(model, "attn.hook_attn_scores")[:, BATCH, :, QUERY].permute(1, 2, 0, 3)
    seen = observed.is_key[:, None].expand_as(own)
    assert (capped(model, scores) - own)[seen].abs().max() < 1e-5 * scores.abs().max()
    x = cached(model, "attn.hook_in").double()
    if model.blocks[0].attn.b_Q is not None:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    layer, head, prompt = 1, 3, 2
    W_Q, W_K = weights(model, layer, head)
    attention = model.blocks[layer].attn
    scale = attention.original_component.scaling
    U, S, Vt = np.linalg.svd((W_Q.T.double() @ W_K.double() * scale).detach().numpy())
    rank = model.cfg.d_head
    pinv_Q, pinv_K = (np.linalg.pinv(W.double().detach().numpy()) for W in (W_Q, W_K))
    query = int(QUERY[prompt])
    moved = pinv_Q @ turned(model, layer, W_Q, query) @ x[layer, prompt, query].numpy()
    for key in range(query + 1):
        if seen[layer, head, prompt, key]:
            other = pinv_K @ turned(model, layer, W_K, key) @ x[layer, prompt, key].numpy()
            expected = (moved @ U)[:rank] * S[:rank] * (Vt @ other)[:rank]
            found = contributions[layer, head, prompt, key].numpy()
            np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    offset, _ = HeadSpace(model).decompose(observed, KEY)
    assert (contributions - offset)[seen].abs().amax() > offset[seen].abs().max() / 10  # another basis


@pytest.mark.parametrize("basis", ["offset", "fixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attended_scores_are_relative_or_raw_in_either_basis(family, basis):
    model = bridge(family)
    space = HeadSpace(model, rope_basis=basis)
    observed = space.observe(tokens(), QUERY)
    attended = space.attended(observed, KEY)
    contributions, _ = space.decompose(observed, KEY)
    seen = observed.is_key[:, None].expand(-1, space.n_heads, -1, -1)
    relative = relative_attention(contributions.double(), seen)[:, :, BATCH, KEY].float()
    torch.testing.assert_close(attended.taken("relative").contributions, relative, rtol=1e-4, atol=2e-5)
    raw = attended.taken("raw")
    torch.testing.assert_close(raw.contributions, contributions[:, :, BATCH, KEY], rtol=1e-4, atol=2e-5)
    if basis == "fixed" or family == "gpt2":  # the key's own coordinates make the score
        torch.testing.assert_close(raw.key, raw.S * raw.direction, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(attended.key, attended.S * attended.direction, rtol=1e-3, atol=1e-3)


def test_without_rotary_positions_there_is_one_basis_anyway():
    model = bridge("gpt2")
    one, other = (HeadSpace(model, rope_basis=basis) for basis in ("offset", "fixed"))
    observed = one.observe(tokens(), QUERY)
    assert torch.equal(one.decompose(observed, KEY)[0], other.decompose(observed, KEY)[0])


def test_heads_without_an_inverse_have_no_fixed_basis():
    model = random_model("gpt_neox")
    with torch.no_grad():
        qkv = model.gpt_neox.layers[1].attention.query_key_value
        width = model.config.hidden_size // model.config.num_attention_heads
        qkv.weight.view(5, 3, width, -1)[2, 1, 0] = 0
        qkv.bias.view(5, 3, width)[2, 1, 0] = 0
    with pytest.raises(
        InputError, match=r"rope_basis='fixed'.*W_K of head 2 in layer 1.*Fix: --model.rope_basis=offset"
    ):
        HeadSpace(make_bridge(model), rope_basis="fixed")


def test_an_unknown_basis_is_refused():
    with pytest.raises(InputError, match=r"rope_basis='each'.*'offset' or 'fixed'"):
        HeadSpace(bridge("llama"), rope_basis="each")
