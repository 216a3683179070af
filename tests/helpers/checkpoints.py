"""Small checkpoints with random weights, written as training programs write them."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["[UNK]", "when", "mary", "and", "john", "went", "to", "the", "store"]
SHAPE = {"vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}


def make_model(family="gpt_neox", seed=0):
    torch.manual_seed(seed)
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, max_position_embeddings=32)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_key_value_heads=2, tie_word_embeddings=family == "llama_tied")
    ).eval()


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save(folder, family="gpt_neox", seed=0, tokenizer=True, **options):
    make_model(family, seed).save_pretrained(folder, **options)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def save_bin(folder, seed=0):
    """As before safetensors: one pickled state dict."""
    model = make_model("gpt_neox", seed)
    model.config.architectures = ["GPTNeoXForCausalLM"]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    make_tokenizer().save_pretrained(folder)
    return folder


def save_bert(folder):
    shape = {**SHAPE, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(folder)


def ids():
    return torch.arange(1, 9)[None]


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def only_ref(source):
    (ref,) = source.refs()
    return ref


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text
