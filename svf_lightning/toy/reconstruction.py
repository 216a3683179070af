"""The reconstruction loss of the toy autoencoder and its gradient, in one pass over the data."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 2**18  # activations up to this size stay in a core's cache


def reconstruction_loss(
    W: Float[Tensor, "I D N"],
    b: Float[Tensor, "I N"],
    f: Float[Tensor, "J T N"],
    importance: Float[Tensor, "I N"] | None = None,
) -> Float[Tensor, " I"]:
    """Mean over T tokens of ``sum_n importance_n (relu(W^T W f + b)_n - f_n)^2``, one value per instance.

    The same as what autograd makes of the formula; the activations f get no gradient. Most of the time of training goes
    here, and with autograd most of that goes into writing and reading activations. The gradient needs none of them once
    ``e f^T`` is summed (e: gradient of the pre-activations), so it is formed together with the loss, a few instances at
    a time. (Elhage et al. 2022.)

    Args:
        W: Features.
        b: Bias of the reconstruction.
        f: Activations; J divides I, and I / J consecutive instances see the same.
        importance: Weight of each feature; None weighs all alike.
    """
    with_grad = torch.is_grad_enabled() and (W.requires_grad or b.requires_grad)
    loss: Tensor = _ReconstructionLoss.apply(W, b, f, importance, with_grad)  # type: ignore[no-untyped-call]
    return loss


class _ReconstructionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, b: Tensor, f: Tensor, importance: Tensor | None, with_grad: bool) -> Tensor:
        n_instances, d_model, N = W.shape
        J, T = f.shape[:2]
        K = n_instances // J
        W, b = W.view(J, K, d_model, N), b.view(J, K, N)
        weights = None if importance is None else importance.view(J, K, N)
        loss, grad_W, grad_b = W.new_empty(J, K), torch.empty_like(W), torch.empty_like(b)
        k_block, j_block = K, J
        if W.device.type == "cpu":
            k_block = min(K, max(1, BLOCK // (T * N)))
            j_block = max(1, BLOCK // (T * N * k_block))
        with torch.autocast(W.device.type, enabled=False):
            for j in range(0, J, j_block):
                for k in range(0, K, k_block):
                    at = (slice(j, j + j_block), slice(k, k + k_block))
                    some = None if weights is None else weights[at]
                    loss[at], gradients = _loss_and_gradients(W[at], b[at], some, f[at[0]], with_grad)
                    if gradients is not None:
                        grad_W[at], grad_b[at] = gradients
        ctx.save_for_backward(grad_W.flatten(0, 1), grad_b.flatten(0, 1))
        return loss.flatten()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_W, grad_b = ctx.saved_tensors
        return grad_W * grad[:, None, None], grad_b * grad[:, None], None, None, None


def _loss_and_gradients(
    W: Float[Tensor, "J K D N"],
    b: Float[Tensor, "J K N"],
    importance: Float[Tensor, "J K N"] | None,
    f: Float[Tensor, "J T N"],
    with_grad: bool,
) -> tuple[Float[Tensor, "J K"], tuple[Float[Tensor, "J K D N"], Float[Tensor, "J K N"]] | None]:
    """Losses of K instances for each of J draws. The K instances stand side by side in one wide matrix product."""
    J, K, D, N = W.shape
    T = f.shape[1]
    by_tokens = 5 * D < 2 * N  # fewer multiplications with the tokens W f in between than with W^T W at once
    if by_tokens:
        tokens = (f @ W.reshape(J, K * D, N).mT).view(J, T, K, D).transpose(1, 2)
        output = (tokens @ W).add_(b[:, :, None]).relu_()  # [J, K, T, N]
        x = f[:, None]
    else:
        gram = (W.mT @ W).transpose(1, 2).reshape(J, N, K * N)  # symmetric: columns of instance k side by side
        output = torch.baddbmm(b.reshape(J, 1, K * N), f, gram).relu_().view(J, T, K, N)
        x = f[:, :, None]
    over = 2 if by_tokens else 1  # the dimension of tokens
    error = output - x
    weighed = error if importance is None else error * importance.unsqueeze(over)
    loss = torch.linalg.vecdot(error, weighed).sum(over) / T
    if not with_grad:
        return loss, None
    e = torch.ops.aten.threshold_backward.grad_input(weighed, output, 0, grad_input=weighed).mul_(2 / T)
    if by_tokens:
        grad_W = tokens.mT @ e + (e @ W.mT).mT @ x
    else:
        outer = (f.mT @ e.view(J, T, K * N)).view(J, N, K, N).transpose(1, 2)
        grad_W = W @ (outer + outer.mT)
    return loss, (grad_W, e.sum(over))
