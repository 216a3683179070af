"""Rotary positions against complex numbers, and against the model families' own code."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama

from svf_lightning.rotary import rotary_angles, rotate

LAYOUTS = pytest.mark.parametrize("layout", ["halves", "adjacent", "interleaved"])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeated(part, layout):
    """Cosines or sines, one for each pair, in the form that a layout has them in."""
    return part.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([part, part], -1)


def pairs_of(n, layout):
    """Indices of the components that turn together."""
    half = n // 2
    return [(k, k + half) if layout == "halves" else (2 * k, 2 * k + 1) for k in range(half)]


@LAYOUTS
def test_a_pair_of_components_turns_as_a_complex_number(layout):
    x, angles = randn(5, 3, 10), randn(5, 3, 4, seed=1)
    turned = rotate(x, repeated(angles.cos(), layout), repeated(angles.sin(), layout), layout=layout).numpy()
    expected = x.numpy().copy()
    for k, (a, b) in enumerate(pairs_of(8, layout)):
        z = (expected[..., a] + 1j * expected[..., b]) * np.exp(1j * angles[..., k].numpy())
        expected[..., a], expected[..., b] = z.real, z.imag
    np.testing.assert_allclose(turned, expected, rtol=1e-12)
    assert (turned[..., 8:] == x.numpy()[..., 8:]).all()  # components beyond the angles do not turn


@LAYOUTS
def test_rotation_keeps_lengths_and_its_transpose_undoes_it(layout):
    x, angles = randn(5, 3, 10), randn(5, 3, 4, seed=1)
    cos, sin = repeated(angles.cos(), layout), repeated(angles.sin(), layout)
    turned = rotate(x, cos, sin, layout=layout)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, cos, sin, layout=layout, transpose=True), x)
    torch.testing.assert_close(rotate(rotate(x, cos, sin, layout=layout, transpose=True), cos, sin, layout=layout), x)
    assert (turned[..., :8] != x[..., :8]).all()


@LAYOUTS
def test_turning_back_is_the_transposed_matrix(layout):
    """Whatever cosines and sines are, as models may scale them."""
    cos, sin = randn(8), randn(8, seed=1)
    eye = torch.eye(10, dtype=torch.float64)
    R = rotate(eye, cos, sin, layout=layout).T  # columns are the turned axes
    torch.testing.assert_close(rotate(eye, cos, sin, layout=layout, transpose=True).T, R.T)
    x = randn(6, 10, seed=2)
    torch.testing.assert_close(rotate(x, cos, sin, layout=layout), x @ R.T)


def test_the_angles_are_position_times_a_geometric_series():
    cos, sin = rotary_angles(torch.tensor([0, 3, -2]), 8, base=50.0, dtype=torch.float64)
    for row, position in enumerate((0, 3, -2)):
        for k in range(4):
            z = np.exp(1j * position * 50.0 ** (-2 * k / 8))
            for at in (k, k + 4):  # in halves
                assert cos[row, at].item() == pytest.approx(z.real, abs=1e-15)
                assert sin[row, at].item() == pytest.approx(z.imag, abs=1e-15)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_positions_are_integers_of_any_shape(shape):
    positions = torch.randint(-900, 900, shape, generator=torch.Generator().manual_seed(3))
    cos, sin = rotary_angles(positions, 6, base=10000.0)
    assert cos.shape == sin.shape == (*shape, 6)
    assert cos.dtype == torch.float32
    whole = rotary_angles(positions.double(), 6, base=10000.0)
    assert torch.equal(cos, whole[0])
    assert torch.equal(sin, whole[1])
    for at in np.ndindex(*shape):
        one = rotary_angles(positions[at], 6, base=10000.0)
        assert torch.equal(cos[at], one[0])
        assert torch.equal(sin[at], one[1])
    back = rotary_angles(-positions, 6, base=10000.0)
    torch.testing.assert_close(cos, back[0])
    torch.testing.assert_close(sin, -back[1])


def test_only_the_offset_of_query_and_key_matters():
    q, k = randn(6), randn(6, seed=1)

    def at(x, position):
        return rotate(x, *rotary_angles(torch.tensor(position), 6, base=50.0, dtype=torch.float64))

    expected = at(q, 17) @ at(k, 12)
    assert (at(q, 1005) @ at(k, 1000)).item() == pytest.approx(expected.item())
    assert (q @ at(k, -5)).item() == pytest.approx(expected.item())
    assert (q @ at(k, -4)).item() != pytest.approx(expected.item())


def test_leading_dimensions_of_vectors_and_positions_are_broadcast():
    x = randn(3, 1, 8)
    cos, sin = rotary_angles(torch.arange(5), 8, base=50.0, dtype=torch.float64)
    turned = rotate(x, cos, sin)
    assert turned.shape == (3, 5, 8)
    torch.testing.assert_close(turned[2, 4], rotate(x[2, 0], cos[4], sin[4]))


def test_angles_are_those_of_llama():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    positions = torch.arange(64)[None]
    theirs = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for own, other in zip(rotary_angles(positions, 8, base=500.0), theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "layout", "n_rotary"),
    [
        (modeling_llama, "halves", 10),
        (modeling_gpt_neox, "halves", 6),
        (modeling_glm, "adjacent", 6),
        (modeling_cohere, "interleaved", 10),
    ],
    ids=["Llama", "GPT-NeoX, a part of the components", "GLM, a part of the components", "Cohere"],
)
def test_vectors_turn_as_in_the_code_of_the_model_family(module, layout, n_rotary):
    q, k = randn(1, 2, 7, 10).float(), randn(1, 2, 7, 10, seed=1).float()  # [batch, head, position, component]
    cos, sin = rotary_angles(torch.arange(7)[None], n_rotary, base=10000.0)
    if layout == "interleaved":
        cos, sin = (repeated(part[..., : n_rotary // 2], layout) for part in (cos, sin))
    theirs = module.apply_rotary_pos_emb(q, k, cos, sin)
    for x, other in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rotate(x, cos[:, None], sin[:, None], layout=layout), other)
