"""The hash of a checkpoint's weights."""

import copy
import re

import pytest
import torch
from helpers.checkpoints import logits, make_model, make_tokenizer, only_ref, save

from svf_lightning.replay import FolderCheckpoints, ModelCheckpoints
from svf_lightning.replay.model_files import weight_hash


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "llama_tied"])
def test_the_hash_does_not_depend_on_where_the_weights_lie(tmp_path, family):
    """One file, shards, memory."""
    save(tmp_path / "one" / "step3", family)
    save(tmp_path / "many" / "step3", family, max_shard_size="6KB")
    assert len(list((tmp_path / "many" / "step3").glob("*.safetensors"))) > 3
    sources = [
        FolderCheckpoints(str(tmp_path / "one")),
        FolderCheckpoints(str(tmp_path / "many")),
        ModelCheckpoints({3: make_model(family)}, make_tokenizer()),
    ]
    loaded = [source.load(only_ref(source)) for source in sources]
    assert len({one.weight_hash for one in loaded}) == 1
    assert re.fullmatch("[0-9a-f]{16}", loaded[0].weight_hash)
    for one in loaded:
        torch.testing.assert_close(logits(one.model), logits(make_model(family)), rtol=0, atol=0)


def test_the_hash_sees_one_bit_of_any_tensor_a_name_a_shape_and_a_dtype():
    model = make_model()
    hashes = {weight_hash(model)}
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())]
    for tensor in tensors:
        values = tensor.detach().reshape(-1).view(torch.uint8)
        for place in (0, -1):
            values[place] ^= 1
            hashes.add(weight_hash(model))
            values[place] ^= 1
    assert len(hashes) == 1 + 2 * len(tensors)
    assert weight_hash(model) in hashes
    zeros = torch.nn.ParameterDict({"a": torch.zeros(6)})
    others = [
        torch.nn.ParameterDict({"b": torch.zeros(6)}),
        torch.nn.ParameterDict({"a": torch.zeros(2, 3)}),
        torch.nn.ParameterDict({"a": torch.zeros(3, 2)}),
        torch.nn.ParameterDict({"a": torch.zeros(12, dtype=torch.half)}),
        torch.nn.ParameterDict({"a": torch.zeros(12, dtype=torch.bfloat16)}),
        torch.nn.ParameterDict({"a": torch.zeros(3, dtype=torch.double)}),
    ]
    assert len({weight_hash(one) for one in [zeros, *others]}) == 7


def test_the_hash_covers_tensors_larger_than_one_piece():
    big = torch.nn.ParameterDict({"a": torch.zeros((9 << 20) // 4 + 3)})
    hashes = {weight_hash(big)}
    for place in (0, 1 << 20, (2 << 20) + 1, -1):
        with torch.no_grad():
            big["a"][place] += 1
        hashes.add(weight_hash(big))
    assert len(hashes) == 5
    with torch.no_grad():  # the same pieces in another order
        big["a"].zero_()[0] = 1
        first = weight_hash(big)
        big["a"].zero_()[1 << 20] = 1
    assert weight_hash(big) != first


def test_a_tied_weight_counts_once_and_a_buffer_that_is_not_saved_not_at_all():
    tied, untied = make_model("llama_tied"), make_model("llama_tied")
    copied = copy.deepcopy(tied)
    assert copied.lm_head.weight.data_ptr() == copied.model.embed_tokens.weight.data_ptr()
    assert weight_hash(copied) == weight_hash(tied)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    assert weight_hash(untied) != weight_hash(tied)
    tied.model.rotary_emb.inv_freq += 1
    assert weight_hash(tied) == weight_hash(copied)
    tied.register_buffer("kept", torch.zeros(3))
    with_buffer = weight_hash(tied)
    tied.kept += 1
    assert len({weight_hash(tied), with_buffer, weight_hash(copied)}) == 3


def test_a_hash_of_what_is_not_contiguous_is_that_of_its_values():
    values = torch.randn(5, 7)
    plain, turned = torch.nn.ParameterDict({"a": values}), torch.nn.ParameterDict({"a": values.T.contiguous().T})
    assert not turned["a"].is_contiguous()
    assert weight_hash(plain) == weight_hash(turned)
