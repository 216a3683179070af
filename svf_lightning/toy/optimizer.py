"""Adam with a learning rate per instance, for cohorts whose members differ in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class InstanceAdam(torch.optim.Adam):
    """Adam or AdamW on parameters [I, ...] whose instances have learning rates of their own.

    The same arithmetic as ``torch.optim.Adam``, whose rate is one number; state and checkpoints have its form. The
    group's ``lr`` is a factor of all rates, so that schedules work as usual.

    Args:
        params: Parameters, each with the instance as first dimension.
        rates: Peak learning rates [I].
        options: As ``torch.optim.Adam`` takes them (``weight_decay``, ``decoupled_weight_decay``).
    """

    def __init__(self, params: Iterable[nn.Parameter], rates: Float[Tensor, " I"], **options: Any) -> None:
        super().__init__(params, lr=1.0, **options)
        self.rates = rates

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                rate = (group["lr"] * self.rates).to(p).view(-1, *[1] * (p.ndim - 1))
                if group["weight_decay"]:
                    p.mul_(1 - rate * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = (state["exp_avg_sq"].sqrt() / (1 - beta2**t) ** 0.5).add_(group["eps"])
                p.sub_(rate / (1 - beta1**t) * (state["exp_avg"] / size))
        return loss
