"""Variants of the toy model: frozen parts, rotary positions, several heads."""

import numpy as np
import pytest
import torch
from helpers.training import train

from svf_lightning.errors import InputError
from svf_lightning.toy import ToyAttentionModel

SIZES = {"n_features": 11, "d_model": 7, "d_head": 4, "n_instances": 2, "init_feature_norm": 1.0}


def activations(n_instances=2, n_batch=5, n_keys=3, n_features=11):
    return torch.rand(n_instances, n_batch, 1 + n_keys, n_features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("freeze", "fixed"), [("features", {"W", "b"}), ("head", {"W_Q", "W_K"}), ("none", set())])
def test_what_is_frozen_keeps_its_bits_and_the_rest_trains(tmp_path, freeze, fixed):
    start = ToyAttentionModel(**SIZES, freeze=freeze)
    model = train(tmp_path, steps=5, model={**SIZES, "freeze": freeze})
    for name, weights in start.state_dict().items():
        assert torch.equal(weights, model.state_dict()[name]) == (name in fixed), name


def rotation(position, d_head, base):
    """R as a dense matrix: component k turns with component k + H/2."""
    R = np.zeros((d_head, d_head))
    for k in range(d_head // 2):
        angle = position * base ** (-2 * k / d_head)
        a, b = k, k + d_head // 2
        R[a, a], R[a, b], R[b, a], R[b, b] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return R


@pytest.mark.parametrize("n_heads", [1, 3])
def test_rotary_logits_are_those_of_rotated_queries_and_keys(n_heads):
    model = ToyAttentionModel(**SIZES, n_heads=n_heads, rope=True, rope_base=50.0, context_length=3).double()
    f = activations().double()
    got = model(f)[1].detach().numpy()
    W, W_Q, W_K = (w.detach().numpy() for w in (model.W, model.W_Q, model.W_K))
    for i in range(2):
        for b in range(5):
            r, keys = W[i] @ f[i, b, 0].numpy(), [W[i] @ f[i, b, 1 + j].numpy() for j in range(3)]
            for j in range(3):
                heads = (slice(4 * h, 4 * h + 4) for h in range(n_heads))
                expected = sum(
                    (rotation(3, 4, 50.0) @ W_Q[i, h] @ r) @ (rotation(j, 4, 50.0) @ W_K[i, h] @ keys[j]) for h in heads
                )
                np.testing.assert_allclose(got[i, b, j], expected, rtol=1e-9)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_heads", [1, 3])
def test_the_heads_of_the_probe_give_the_models_own_logits(n_heads, rope):
    model = ToyAttentionModel(**SIZES, n_heads=n_heads, rope=rope, context_length=3).double()
    f = activations().double()
    tokens = f @ model.W.mT[:, None]
    probe = model.probe()
    omega = probe.heads.W_Q.mT @ probe.heads.W_K
    if n_heads > 1:
        omega = omega.sum(1)
    if rope:  # the last key is one step before the query
        omega = omega.flip(1)
        logits = torch.einsum("ibd,ijde,ibje->ibj", tokens[:, :, 0], omega, tokens[:, :, 1:])
    else:
        logits = torch.einsum("ibd,ide,ibje->ibj", tokens[:, :, 0], omega, tokens[:, :, 1:])
    torch.testing.assert_close(model(f)[1], logits)


@pytest.mark.parametrize(
    ("target_position", "factor"), [("independent", [1, 1, 1]), ("decay", np.exp([-2, -1, 0])), ("nearest", [0, 0, 1])]
)
def test_the_target_follows_the_offset(target_position, factor):
    model = ToyAttentionModel(**SIZES, rope=True, target_position=target_position, context_length=3)
    f = activations()
    f[:, :, 0, 0] = f[:, :, 1:, 1] = 1.0
    expected = torch.tensor(np.asarray(factor, dtype=np.float32) * 5).expand(2, 5, 3)
    torch.testing.assert_close(model.target_logits(f), expected)
    torch.testing.assert_close(model.probe().pair_logits[..., 0].flip(-1), expected[:, 0])


def test_heads_that_add_up_are_one_head_with_all_their_rows():
    several = ToyAttentionModel(**SIZES, n_heads=3)
    one = ToyAttentionModel(**{**SIZES, "d_head": 12})
    one.load_state_dict(several.state_dict())
    assert torch.equal(one(activations())[1], several(activations())[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "everything"}, "freeze"),
        ({"freeze": "head", "template": "zero"}, "without a head"),
        ({"rope": True, "d_head": 3}, "even"),
        ({"target_position": "decay"}, "rope"),
        ({"n_heads": 0}, "n_heads"),
        ({"rope": True, "rope_base": 1.0}, "rope_base"),
        ({"init_head": "best"}, "init_head"),
        ({"cone_strength": -1.0}, "cone_strength"),
    ],
)
def test_settings_that_make_no_sense_are_input_errors(options, message):
    with pytest.raises(InputError, match=message):
        ToyAttentionModel(**{**SIZES, **options})


@pytest.mark.parametrize("options", [{"rope": True, "d_model": 8}, {"template": "zero"}])
def test_attended_pairs_need_a_head_without_rotary_positions(options):
    with pytest.raises(InputError, match="n_attended"):
        ToyAttentionModel(n_attended=4, **options)
