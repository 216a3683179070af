"""Checkpoints of LitGPT are read as the models that LitGPT has trained."""

import pytest
import torch
import yaml
from helpers.replays import replay
from transformers import AutoTokenizer

from svf_lightning.errors import CheckpointError, InputError
from svf_lightning.replay import FolderCheckpoints

F = torch.nn.functional
LLAMA = {
    "mlp_class_name": "LLaMAMLP", "norm_class_name": "RMSNorm", "bias": False, "parallel_residual": False,
    "rotary_percentage": 1.0, "intermediate_size": 40,
}  # fmt: skip
SIZES = {"name": "own", "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "vocab_size": 222}


def settings_of(**changes):
    """Fields of model_config.yaml, with LitGPT's defaults where they count."""
    defaults = {
        "padded_vocab_size": 256, "norm_eps": 1e-5, "parallel_residual": True, "mlp_class_name": "GptNeoxMLP",
        "norm_class_name": "LayerNorm", "bias": True, "rotary_percentage": 0.25, "rope_base": 10000,
        "rope_condense_ratio": 1, "gelu_approximate": "none",
    }  # fmt: skip
    made = {**SIZES, **defaults, **changes}
    made.setdefault("head_size", made["n_embd"] // made["n_head"])
    made.setdefault("n_query_groups", made["n_head"])
    made.setdefault("intermediate_size", 4 * made["n_embd"])
    return made


def weights_of(c, seed=0):
    """Random weights under LitGPT's names."""
    draw = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, n_out, n_in, *, bias):
        state[f"{name}.weight"] = torch.randn(n_out, n_in, generator=draw) * 0.3
        if bias:
            state[f"{name}.bias"] = torch.randn(n_out, generator=draw) * 0.3

    def norm(name):
        state[f"{name}.weight"] = 1 + torch.randn(c["n_embd"], generator=draw) * 0.3
        if c["norm_class_name"] == "LayerNorm":
            state[f"{name}.bias"] = torch.randn(c["n_embd"], generator=draw) * 0.3

    width, inner, bias = c["n_embd"], c["intermediate_size"], c["bias"]
    n_qkv = (c["n_head"] + 2 * c["n_query_groups"]) * c["head_size"]
    linear("lm_head", c["padded_vocab_size"], width, bias=False)
    linear("transformer.wte", c["padded_vocab_size"], width, bias=False)
    for layer in range(c["n_layer"]):
        at = f"transformer.h.{layer}"
        norm(f"{at}.norm_1")
        norm(f"{at}.norm_2")
        linear(f"{at}.attn.qkv", n_qkv, width, bias=bias)
        linear(f"{at}.attn.proj", width, c["n_head"] * c["head_size"], bias=bias)
        for part in ("fc_1", "fc_2") if c["mlp_class_name"] == "LLaMAMLP" else ("fc",):
            linear(f"{at}.mlp.{part}", inner, width, bias=bias)
        linear(f"{at}.mlp.proj", width, inner, bias=bias)
    norm("transformer.ln_f")
    return state


def logits_of(c, state, tokens):
    """The model that LitGPT's documentation describes, written down plainly: one head after the other."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, x):
        if c["norm_class_name"] == "LayerNorm":
            return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], c["norm_eps"])
        return x / (x.square().mean(-1, keepdim=True) + c["norm_eps"]).sqrt() * state[f"{name}.weight"]

    size = c["head_size"]
    n_turned = int(c["rotary_percentage"] * size)
    angle = torch.arange(tokens.shape[1])[:, None] / c["rope_condense_ratio"] / (
        c["rope_base"] ** (torch.arange(0, n_turned, 2) / n_turned)
    )  # fmt: skip

    def turned(x):
        first, second, rest = x[..., : n_turned // 2], x[..., n_turned // 2 : n_turned], x[..., n_turned:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def attention(at, x):
        qkv = linear(f"{at}.attn.qkv", x)
        n_q, n_k = c["n_head"], c["n_query_groups"]
        heads = []
        for head in range(n_q):
            group = head // (n_q // n_k)
            q, k, v = (qkv[..., i * size : (i + 1) * size] for i in (head, n_q + group, n_q + n_k + group))
            scores = turned(q) @ turned(k).mT / size**0.5
            mask = torch.ones(scores.shape[-2:]).triu(1).bool()
            heads.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ v)
        return linear(f"{at}.attn.proj", torch.cat(heads, -1))

    def mlp(at, x):
        if c["mlp_class_name"] == "LLaMAMLP":
            return linear(f"{at}.mlp.proj", F.silu(linear(f"{at}.mlp.fc_1", x)) * linear(f"{at}.mlp.fc_2", x))
        return linear(f"{at}.mlp.proj", F.gelu(linear(f"{at}.mlp.fc", x), approximate=c["gelu_approximate"]))

    x = state["transformer.wte.weight"][tokens]
    for layer in range(c["n_layer"]):
        at = f"transformer.h.{layer}"
        read = attention(at, norm(f"{at}.norm_1", x))
        if c["parallel_residual"]:
            x = x + read + mlp(at, norm(f"{at}.norm_2", x))
        else:
            x = x + read
            x = x + mlp(at, norm(f"{at}.norm_2", x))
    return linear("lm_head", norm("transformer.ln_f", x))


def write(folder, settings, state, *, tokenizer=None, **training):
    folder.mkdir(parents=True)
    torch.save({"model": state, **training} if training else state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("changes", [
    {},
    {"parallel_residual": False, "gelu_approximate": "tanh", "rotary_percentage": 1.0, "norm_eps": 1e-2},
    {"rope_base": 300, "rope_condense_ratio": 3, "rotary_percentage": 0.75, "n_head": 2},
    LLAMA,
    {**LLAMA, "n_query_groups": 2, "head_size": 10, "norm_eps": 1e-2, "rope_base": 500},
])  # fmt: skip
def test_a_folder_of_litgpt_is_the_same_model(tmp_path, changes):
    settings = settings_of(**changes)
    state = weights_of(settings)
    write(tmp_path / "step-00000250", settings, state, iter_num=9, optimizer={"state": {}})
    source = FolderCheckpoints(str(tmp_path))
    (ref,) = source.refs()
    assert ref.step == 250
    tokens = torch.randint(0, 222, (2, 17))
    model = source.load(ref).model
    torch.testing.assert_close(model(tokens).logits, logits_of(settings, state, tokens), rtol=1e-4, atol=1e-4)
    assert source.config().to_dict() == model.config.to_dict()


def test_frequencies_of_llama_3_are_those_of_transformers(tmp_path):
    stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
    settings = settings_of(**LLAMA, rope_adjustments=stretch)
    write(tmp_path / "step-1", settings, weights_of(settings))
    source = FolderCheckpoints(str(tmp_path))
    assert source.load(source.refs()[0]).model.config.rope_parameters == {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip


def test_a_training_of_litgpt_is_replayed(suite, tmp_path):
    tokenizer, settings = AutoTokenizer.from_pretrained(suite / "step0"), settings_of(**LLAMA)
    for step in (100, 200):
        place = tmp_path / "out" / f"step-{step:08d}"
        write(place, settings, weights_of(settings, seed=step), tokenizer=tokenizer, step_count=step)
    rows = replay(FolderCheckpoints(str(tmp_path / "out")), tmp_path / "run")
    assert rows["step"].values.tolist() == [100, 200]
    assert len(set(rows["weight_hash"].values.tolist())) == 2
    assert float(rows["sad/score_error"].max()) < 1e-5


@pytest.mark.parametrize(("changes", "said"), [
    ({"norm_qk": True}, "norm_qk: True"),
    ({"bias": False}, "bias: False"),
    ({**LLAMA, "attn_bias": True}, "attn_bias: True"),
    ({**LLAMA, "mlp_class_name": "LLaMAMoE"}, "mlp_class_name: LLaMAMoE"),
    ({"sliding_window_size": 8}, "sliding_window_size: 8"),
    ({"n_query_groups": 2}, "key heads"),
    ({**LLAMA, "rope_adjustments": {"factor": 2.0, "beta_fast": 32}}, "rope_adjustments"),
])  # fmt: skip
def test_what_has_another_shape_is_refused_with_the_term_and_the_command(tmp_path, changes, said):
    settings = settings_of(**changes)
    write(tmp_path / "step-1", settings, {"lm_head.weight": torch.zeros(2, 2)})
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"{said}.*litgpt convert_from_litgpt") as error:
        source.load(source.refs()[0])
    assert "\n" not in str(error.value)
    assert source.config() is None


@pytest.mark.parametrize(("damage", "said"), [
    (lambda s, state: state.pop("lm_head.weight"), "lacks lm_head.weight"),
    (lambda s, state: state.update({"transformer.h.0.attn.lora_A": torch.zeros(2)}), "litgpt merge_lora"),
    (lambda s, state: state.update({"extra.weight": torch.zeros(2)}), "also has extra.weight"),
    (lambda s, state: s.update(n_head=3), "does not fit.*heads"),
    (lambda s, state: s.update(n_head=8), "transformer.h.0.attn.qkv"),
    (lambda s, state: s.update(n_embd=40), "is no checkpoint of LitGPT|asks for"),
    (lambda s, state: s.pop("n_layer"), "has no n_layer"),
    (lambda s, state: s.update(n_layer="2"), "has no n_layer"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, damage, said):
    settings = settings_of(**LLAMA)
    state = weights_of(settings)
    damage(settings, state)
    write(tmp_path / "step-1", settings, state)
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=said) as error:
        source.load(source.refs()[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "content"), [
    ("lit_model.pth", b""), ("lit_model.pth", b"no pickle"), ("model_config.yaml", b"a: [1"),
    ("model_config.yaml", b"- 1"), ("model_config.yaml", b"\xff\xfe\x00"),
])  # fmt: skip
def test_a_damaged_file_is_one_line(tmp_path, file, content):
    settings = settings_of()
    write(tmp_path / "step-1", settings, weights_of(settings))
    (tmp_path / "step-1" / file).write_bytes(content)
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises((CheckpointError, InputError), match=r"step-1.*(cannot be|damaged)") as error:
        source.load(source.refs()[0])
    assert "\n" not in str(error.value)


def test_weights_without_their_settings_say_what_is_missing(suite, tmp_path):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "config.json").write_bytes((suite / "step0" / "config.json").read_bytes())
    torch.save({}, folder / "lit_model.pth")
    source = FolderCheckpoints(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model_config\.yaml"):
        source.load(source.refs()[0])
