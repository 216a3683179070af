"""The hand-written reconstruction loss against what autograd makes of its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.toy import reconstruction as module
from svf_lightning.toy.reconstruction import reconstruction_loss


def by_autograd(W, b, f, importance):
    x = f.repeat_interleave(len(W) // len(f), 0)
    error = torch.relu(x @ W.mT @ W + b[:, None]) - x
    weights = 1 if importance is None else importance[:, None]
    return (weights * error.square()).sum(-1).mean(-1)


def tensors(J, K, T, D, N, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    W, b = (torch.randn(J * K, *shape, generator=g, dtype=dtype) for shape in ((D, N), (N,)))
    f = torch.rand(J, T, N, generator=g, dtype=dtype).sub_(0.6).relu_()
    return W.requires_grad_(), b.requires_grad_(), f, torch.rand(J * K, N, generator=g, dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(
    J=st.integers(1, 4), K=st.integers(1, 4), T=st.integers(1, 9), D=st.integers(1, 6), N=st.integers(1, 12),
    weighed=st.booleans(), block=st.sampled_from([1, 40, 200, 2**18]), seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_autograd(J, K, T, D, N, weighed, block, seed):
    W, b, f, importance = tensors(J, K, T, D, N, seed)
    importance = importance if weighed else None
    upstream = torch.linspace(-1, 2, J * K, dtype=W.dtype)  # each instance's loss counts differently
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        loss = reconstruction_loss(W, b, f, importance)
        found = torch.autograd.grad((loss * upstream).sum(), (W, b))
    expected = by_autograd(W, b, f, importance)
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, torch.autograd.grad((expected * upstream).sum(), (W, b)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("D", "N"), [(5, 10), (2, 10)])  # by W^T W, and by tokens
def test_gradients_pass_gradcheck(D, N):
    W, b, f, importance = tensors(2, 2, 5, D, N, seed=1)
    assert torch.autograd.gradcheck(lambda W, b: reconstruction_loss(W, b, f, importance), (W, b))


def test_without_gradients_none_are_made():
    W, b, f, _ = tensors(1, 3, 4, 2, 5, seed=0)
    with torch.no_grad():
        loss = reconstruction_loss(W, b, f)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_autograd(W, b, f, None).detach())
    assert reconstruction_loss(W.detach(), b, f).requires_grad  # frozen features, trained bias


def test_the_activations_are_left_as_they_are():
    W, b, f, importance = tensors(2, 2, 4, 3, 5, seed=0)
    before = f.clone()
    reconstruction_loss(W, b, f, importance).sum().backward()
    assert f.equal(before)


@pytest.mark.parametrize("options", [{}, {"rope": True, "d_head": 4}, {"n_heads": 2}, {"importance": 0.8}])
@pytest.mark.parametrize("n_draws", [1, 2, 3])
def test_instances_that_share_a_draw_have_the_losses_of_the_repeated_draw(n_draws, options):
    sizes = {"n_features": 7, "d_model": 4, "n_instances": 6, "context_length": 3}
    model = ToyAttentionModel(
        **sizes,
        template="linear",
        n_pairs=2,
        target_logit=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        init_feature_norm=1.0,
        **options,
    )
    data = ToyData(
        n_features=7, n_instances=n_draws, context_length=3, batch_size=8, streams="separate", feature_probability=0.4
    )
    f = data.draw(0)
    assert len(f) == n_draws
    one, other = model.losses(f), model.losses(f.repeat_interleave(6 // n_draws, 0))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    torch.testing.assert_close(model(f), model(f.repeat_interleave(6 // n_draws, 0)))


@pytest.mark.parametrize("options", [{}, {"n_heads": 2}, {"rope": True, "d_head": 4}])
def test_the_loss_is_that_of_the_forward_pass(options):
    model = ToyAttentionModel(
        n_features=7, d_model=4, n_instances=3, context_length=3, init_feature_norm=1.0, **options
    )
    f = ToyData(n_features=7, n_instances=3, context_length=3, batch_size=8, streams="separate").draw(0)
    reconstruction, logits = model(f)
    losses = model.losses(f)
    torch.testing.assert_close(losses["loss/recon"], (reconstruction - f).square().sum(-1).mean((1, 2)))
    target = model.target_logits(f).softmax(-1)
    torch.testing.assert_close(losses["loss/attn"], -(target * logits.log_softmax(-1)).sum(-1).mean(-1))
