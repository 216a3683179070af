"""The toy model: a ReLU autoencoder and one attention head that share a feature matrix, I of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import InstanceMean
from svf_lightning.probe import Coordinate, Probe
from svf_lightning.rotary import rotary_angles, rotate
from svf_lightning.terminal import say
from svf_lightning.toy.features import ToyData
from svf_lightning.toy.instances import PerInstance, instance_seeds, per_instance
from svf_lightning.toy.optimizer import InstanceAdam
from svf_lightning.toy.options import ToyOptions
from svf_lightning.toy.reconstruction import reconstruction_loss
from svf_lightning.toy.template import make_template
from svf_lightning.toy.weights import FEATURE_KINDS, initial_features, initial_head

Losses = dict[str, Tensor]


class ToyAttentionModel(pl.LightningModule):
    """Features W trained to be reconstructed (Elhage et al. 2022) and to be attended to (arXiv 2602.13524, section 3).

    Tokens are ``r = W f``; reconstruction ``f' = relu(W^T r + b)``; attention logits ``r^T Omega s_j`` with
    ``Omega = W_Q^T W_K`` (no 1/sqrt(H)) against the target logits ``f_r^T T f_{s_j}``;
    ``L = L_recon + lambda * L_attn``. The loss that is differentiated is the sum over instances, so that each trains
    as if it were alone.

    With ``rope`` (Appendix D), key j = 0..m-1 stands at position j and the query at position m, after the keys (a
    choice); queries and keys are rotated by their position, so that the head has one bilinear form per offset 1..m:
    ``Omega_delta = W_Q^T R_delta^T W_K``. Several heads add up their logits.

    Args:
        options: The fields of :class:`svf_lightning.toy.options.ToyOptions`, by name.

    Raises:
        InputError: A setting out of range, or settings that do not fit each other.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = o = ToyOptions(**options)
        self.save_hyperparameters(asdict(o), logger=False)
        N, D, H, I = o.n_features, o.D, o.H, o.n_instances  # noqa: E741 (the method's symbols)
        self.n_features, self.d_model, self.d_head, self.n_instances, self.n_heads = N, D, H, I, o.n_heads
        self.template = make_template(
            o.template, n_features=N, n_instances=I, n_pairs=o.n_pairs, target_logit=o.target_logit
        )
        self.has_head = len(self.template.pairs) > 0
        self.seeds = instance_seeds(o.seed, I, key="model.seed")
        self.learning_rates = per_instance("learning_rate", o.learning_rate, I, low=0, open_low=True)
        lambdas = per_instance("lambda_attn", o.lambda_attn, I, low=0)
        strengths = per_instance("cone_strength", o.cone_strength, I, low=0)
        importance = _importance(o.importance, N, I)
        self._weigh_features = bool((importance != 1).any())
        # buffers that are settings: they follow the device and stay out of checkpoints
        self.register_buffer("lambda_attn", lambdas.float(), persistent=False)
        self.register_buffer("importance", importance.float(), persistent=False)
        self.register_buffer("pairs", self.template.pairs, persistent=False)
        self.register_buffer("pair_logits", self.template.logits, persistent=False)
        self.lambda_attn: Tensor
        self.importance: Tensor
        self.pairs: Tensor
        self.pair_logits: Tensor

        W = initial_features(o.init_features, n_features=N, d_model=D, seeds=self.seeds, cone_strength=strengths)
        if o.init_features in FEATURE_KINDS:
            W = W * o.init_feature_norm
        self.W = nn.Parameter(W.float(), requires_grad=o.freeze != "features")  # [I, D, N]
        self.b = nn.Parameter(torch.zeros(I, N), requires_grad=o.freeze != "features")
        if self.has_head:
            rows = o.n_heads * H  # heads whose logits add up act as one head with all their rows
            if o.init_head == "random":
                W_Q, W_K = (w * (o.init_head_scale / H**0.5) for w in _normal_heads(self.seeds, N, D, rows))
            else:
                W_Q, W_K = initial_head(o.init_head, features=W, template=self.template, d_head=rows)
            self.W_Q = nn.Parameter(W_Q.float(), requires_grad=o.freeze != "head")  # [I, n_heads * H, D]
            self.W_K = nn.Parameter(W_K.float(), requires_grad=o.freeze != "head")
        self._coords = self._coordinates(lambdas, strengths)
        self._observed: Tensor | None = None
        self._attended: tuple[Tensor, Tensor] | None = None
        self._loaded_step = 0
        self._settings_changed = False
        self._held_out: dict[str, InstanceMean] = {}

    def _coordinates(self, lambdas: Tensor, strengths: Tensor) -> dict[str, Coordinate]:
        """What the instances, pairs and offsets are."""
        coords: dict[str, Coordinate] = {"seed": (("instance",), self.seeds), "lambda_attn": (("instance",), lambdas)}
        if self.options.init_features == "cone":
            coords["cone_strength"] = (("instance",), strengths)
        offsets = torch.arange(1, self.options.context_length + 1)
        if self.options.rope:
            coords["offset"] = (("offset",), offsets)
        if self.has_head:
            coords["query_feature"] = (("pair",), self.template.pairs[:, 0])
            coords["key_feature"] = (("pair",), self.template.pairs[:, 1])
            coords["target_logit"] = (("instance", "pair"), self.template.logits)
            if self.options.rope:  # the form depends on the offset
                by_offset = self.template.logits[:, None] * self._position_factor(offsets)[:, None]
                coords["target_logit"] = (("instance", "offset", "pair"), by_offset)
        return coords

    # ---- the model -------------------------------------------------------------------------------------------------

    def forward(self, f: Float[Tensor, "J B m1 N"]) -> tuple[Tensor, Tensor | None]:
        """Reconstruction and attention logits of sequences of feature activations.

        Args:
            f: Activations [J, B, 1 + m, N]; position 0 is the query. J divides I: I / J consecutive instances see the
                same numbers.

        Returns:
            f': reconstructed activations [I, B, 1 + m, N]; attention logits [I, B, m], or None without a head.
        """
        n_batch, n_tokens = f.shape[1:3]
        tokens = self._per_instance(f).flatten(1, 2) @ self.W.mT
        reconstruction = torch.relu(torch.baddbmm(self.b[:, None], tokens, self.W))
        reconstruction = reconstruction.view(self.n_instances, n_batch, n_tokens, self.n_features)
        if not self.has_head:
            return reconstruction, None
        tokens = tokens.view(self.n_instances, n_batch, n_tokens, self.d_model)
        if self.options.rope:
            return reconstruction, self._rotated_logits(tokens)
        # (r W_Q^T W_K) . s: the keys themselves need no projection
        towards = tokens[:, :, 0] @ self.W_Q.mT @ self.W_K
        return reconstruction, (towards[:, :, None] @ tokens[:, :, 1:].mT).squeeze(2)

    def _per_instance(self, f: Float[Tensor, "J B m1 N"]) -> Float[Tensor, "I B m1 N"]:
        """The activations that each instance sees."""
        n_draws = len(f)
        return f.unsqueeze(1).expand(-1, self.n_instances // n_draws, -1, -1, -1).flatten(0, 1)

    def _logits(self, f: Float[Tensor, "J B m1 N"]) -> Float[Tensor, "I B m"]:
        """Attention logits, as those of :meth:`forward`; without rope, no key needs its token."""
        if self.options.rope:
            return self._rotated_logits(self._per_instance(f) @ self.W.mT[:, None])
        (J, B, _, N), rows = f.shape, self.W_Q.shape[1]
        # products of the instances that share a draw stand side by side
        queries = f[:, :, 0].contiguous() @ (self.W_Q @ self.W).view(J, -1, N).mT
        queries = queries.view(J, B, -1, rows).transpose(1, 2).flatten(0, 1)
        towards = (queries @ (self.W_K @ self.W)).view(J, -1, B, N).transpose(1, 2)
        return (towards @ f[:, :, 1:].mT).transpose(1, 2).flatten(0, 1)

    def _rotated_logits(self, tokens: Float[Tensor, "I B m1 D"]) -> Float[Tensor, "I B m"]:
        """Logits with rotary positions: only the offset matters, so the keys alone are rotated, back by it."""
        query, keys = tokens[:, :, :1] @ self.W_Q.mT[:, None], tokens[:, :, 1:] @ self.W_K.mT[:, None]
        query, keys = (x.view(*x.shape[:-1], self.n_heads, self.d_head) for x in (query, keys))
        offsets = torch.arange(keys.shape[2], 0, -1, device=keys.device)
        logits: Tensor = (query * self._rotated(keys, -offsets[:, None])).sum((-1, -2))
        return logits

    def _rotated(self, x: Float[Tensor, "... H"], positions: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Vectors, each turned by a position; leading dimensions are broadcast."""
        cos, sin = rotary_angles(positions, self.d_head, base=self.options.rope_base, dtype=x.dtype)
        return rotate(x, cos, sin)

    def _position_factor(self, offsets: Tensor) -> Tensor:
        """What the target logits are multiplied with at each offset."""
        if self.options.target_position == "decay":
            return torch.exp(1.0 - offsets)
        if self.options.target_position == "nearest":
            return (offsets == 1).float()
        return torch.ones_like(offsets, dtype=torch.float32)

    def target_logits(self, f: Float[Tensor, "J B m1 N"]) -> Float[Tensor, "I B m"]:
        """``f_r^T T f_{s_j}`` for every key j, from the non-zero entries of T alone."""
        products = f[:, :, :1, self.pairs[:, 0]] * f[:, :, 1:, self.pairs[:, 1]]  # [J, B, m, P]
        weights = self.pair_logits.expand(self.n_instances, -1).reshape(len(f), self.n_instances // len(f), -1)
        logits = torch.einsum("jbmp,jkp->jkbm", products, weights).flatten(0, 1)
        if self.options.target_position == "independent":
            return logits
        return logits * self._position_factor(torch.arange(logits.shape[-1], 0, -1, device=logits.device))

    def losses(self, f: Float[Tensor, "J B m1 N"]) -> Losses:
        """``loss/recon``, ``loss/attn`` and ``loss/kl`` (with a head), and ``loss/total``, one value per instance [I].

        The attention's are in nats. ``loss/kl`` is ``loss/attn`` without the target's entropy, which no head can take
        off; nothing is differentiated through it.
        """
        flat = f.flatten(1, 2)
        recon = reconstruction_loss(self.W, self.b, flat, self.importance if self._weigh_features else None)
        if not self.has_head:
            return {"loss/recon": recon, "loss/total": recon}
        logits = self._logits(f)
        target = self.target_logits(f).softmax(-1)
        attn = -(target * F.log_softmax(logits, -1)).sum((1, 2)) / logits.shape[1]
        with torch.no_grad():
            entropy = torch.special.entr(target).sum((1, 2)) / logits.shape[1]
            kl = (attn - entropy).clamp_min(0)  # but for rounding it is no less
        return {"loss/recon": recon, "loss/attn": attn, "loss/kl": kl, "loss/total": recon + self.lambda_attn * attn}

    def probe(self) -> Probe:
        """Heads and features as they are now.

        The leading dimension of the features is "instance"; the heads also have "head", if there are several, and
        "offset" with rope.
        """
        step = max(self.global_step, self._loaded_step)
        W = _measurable(self.W)
        if not self.has_head:
            return Probe(step, features=W, coords=self._coords)
        queries = keys = None
        if self._observed is not None:
            tokens = self._observed.to(W) @ W.mT[:, None]
            queries, keys = tokens[:, :, 0], tokens[:, :, 1:]
        attended = [None, None] if self._attended is None else [f.to(W) @ W.mT for f in self._attended]
        W_Q, W_K = _measurable(self.W_Q), _measurable(self.W_K)
        logits = self.pair_logits.to(W.dtype)
        batch_dims: tuple[str, ...] = ("instance",)
        if self.n_heads > 1:
            W_Q, W_K = (w.view(len(w), self.n_heads, self.d_head, self.d_model) for w in (W_Q, W_K))
            logits = logits[:, None].expand(-1, self.n_heads, -1)
            batch_dims += ("head",)
        if self.options.rope:
            offsets = torch.arange(1, self.options.context_length + 1, device=W_K.device)
            W_K = self._rotated(W_K.mT[..., None, :, :], -offsets[:, None]).mT  # [..., m, H, D]
            W_Q = W_Q[..., None, :, :].expand_as(W_K)
            logits = logits[..., None, :] * self._position_factor(offsets)[:, None]
            batch_dims += ("offset",)
        return Probe(
            step,
            heads=AttentionHeads(W_Q, W_K),
            features=W,
            pairs=self.pairs,
            pair_logits=logits,
            queries=queries,
            keys=keys,
            attended_queries=attended[0],
            attended_keys=attended[1],
            batch_dims=batch_dims,
            feature_dims=("instance",),
            coords=self._coords,
        )

    # ---- training --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check what only the trainer knows; raises as :meth:`check`."""
        data = getattr(self.trainer, "datamodule", None)
        self.check(self.trainer, data, stage)
        if isinstance(data, ToyData):
            self.look_at(data)

    def look_at(self, data: ToyData) -> None:
        """Take the held-out draws whose tokens the probe is to show (``n_observed``, ``n_attended``).

        Raises:
            InputError: The data hold too few of them.
        """
        if self.options.n_observed:
            self._observed = data.observed(self.options.n_observed, device=self.device)
        if self.options.n_attended:
            self._attended = data.attended(self.pairs, self.options.n_attended, device=self.device)

    def check(self, trainer: pl.Trainer, data: object, stage: str) -> None:
        """Check that trainer and data fit the model, before anything is written.

        Raises:
            InputError: A trainer option that would change what a step means, or a head without keys to choose from.
        """
        if trainer.accumulate_grad_batches != 1:
            raise bad_value(
                "trainer.accumulate_grad_batches",
                trainer.accumulate_grad_batches,
                "1",
                "raise --data.batch_size instead",
            )
        if trainer.world_size != 1:
            raise bad_value(
                "trainer.devices", trainer.world_size, "1", "instances already train side by side on one device"
            )
        if isinstance(data, ToyData) and self.has_head and data.context_length < 2:
            raise bad_value(
                "context_length",
                data.context_length,
                "at least 2 with a head, as over a single key every head has the same attention",
                "change --data.context_length",
            )
        if isinstance(data, ToyData) and self.options.rope and data.context_length != self.options.context_length:
            raise bad_value(
                "model.context_length",
                self.options.context_length,
                f"{data.context_length}, as in the data",
                "give both alike",
            )
        if stage == "fit" and (line := self._unmatchable()):
            say(line)
        if self.options.lr_schedule != "constant" and stage == "fit" and trainer.max_steps < 1:
            raise bad_value(
                "trainer.max_steps",
                trainer.max_steps,
                f"at least 1 with lr_schedule={self.options.lr_schedule}",
                "set it",
            )

    def on_fit_start(self) -> None:
        """Count steps with the trainer."""
        self._loaded_step = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which training step the weights stand for (``test`` does not restore the trainer's counter)."""
        self._loaded_step = int(checkpoint.get("global_step", 0))
        if self._settings_changed and checkpoint.get("optimizer_states"):
            self._use_own_rates(checkpoint)

    def continue_differently(self) -> None:
        """Go on from a checkpoint with the optimizer's settings of this model, not with those that it was saved with.

        Without this call, a checkpoint brings its learning rate, weight decay and schedule along. The averages of the
        gradients are kept, if the same parameters are trained.
        """
        self._settings_changed = True

    def _use_own_rates(self, checkpoint: dict[str, Any]) -> None:
        """Put this model's learning rate, weight decay and schedule into the state that a training goes on with."""
        step = int(checkpoint["global_step"])
        configured = self.configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        (saved,) = checkpoint["optimizer_states"]
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
            checkpoint["optimizer_states"] = []  # others than before are trained
            return
        saved["param_groups"] = groups
        checkpoint["lr_schedulers"] = []
        if isinstance(configured, dict):
            scheduler = configured["lr_scheduler"]["scheduler"]
            factor = self._schedule_factor(step)
            for group, base in zip(groups, scheduler.base_lrs, strict=True):
                group["lr"] = base * factor
            rates = [group["lr"] for group in groups]
            progress = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
            checkpoint["lr_schedulers"] = [{**scheduler.state_dict(), **progress}]

    def _schedule_factor(self, step: int) -> float:
        """What the schedule multiplies the learning rate with at a step, in closed form."""
        done = min(1.0, step / self.trainer.max_steps)
        return (1 + math.cos(math.pi * done)) / 2 if self.options.lr_schedule == "cosine" else 1.0 - done

    def training_step(self, batch: Tensor, batch_idx: int) -> Losses:
        """Losses of one draw; ``loss`` is their sum over instances.

        An instance whose loss is not finite ends there: its gradient is NaN, and so are its weights from then on.
        """
        losses = self.losses(batch)
        total = losses["loss/total"]
        going_on = torch.where(total.detach().isfinite(), 1.0, torch.nan)
        return {"loss": (total * going_on).sum(), **losses}

    @torch.no_grad()
    def current_losses(self) -> Losses:
        """Losses of the current weights on the draw of the current step: what the next training step would see."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ToyData):
            return {}
        return self.losses(data.draw(self.trainer.global_step, device=self.device).to(self.W.dtype))

    def configure_optimizers(self) -> Any:
        """Adam or AdamW with the schedule, stepped after every update."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {
            "weight_decay": self.options.weight_decay,
            "decoupled_weight_decay": self.options.optimizer == "adamw",
        }
        rates = self.learning_rates
        optimizer: torch.optim.Optimizer
        if bool((rates == rates[0]).all()):
            optimizer = torch.optim.Adam(trained, lr=rates[0].item(), fused=True, **options)
        else:
            optimizer = InstanceAdam(trained, rates, **options)
        if self.options.lr_schedule == "constant":
            return optimizer
        total = self.trainer.max_steps
        if self.options.lr_schedule == "cosine":
            schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
        else:
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each instance by its own norm: a common norm would let instances slow each other down."""
        if not gradient_clip_val:
            return
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
            return
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factor = (gradient_clip_val / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
        for g in grads:
            g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))

    def _unmatchable(self) -> str:
        """A line for a template whose pairs cannot have a singular pair each; empty if they can."""
        n_pairs = len(self.template.pairs)
        if n_pairs < 2:
            return ""
        ranks = torch.linalg.matrix_rank(self.template.matrix().double())
        most = min(int(ranks.min()), self.d_model, self.n_heads * self.d_head)
        if most >= n_pairs:
            return ""
        return (
            f"svf-lightning: {n_pairs} target pairs, and no more than {most} singular pairs for them: matched one to "
            "one, alignment/matched cannot reach 1 (PairSharing tells which pairs share one)"
        )

    # ---- held-out evaluation ---------------------------------------------------------------------------------------

    def _begin_held_out(self) -> None:
        self._held_out = {}

    def _held_out_step(self, f: Tensor) -> Losses:
        losses = self.losses(f)
        for name, value in losses.items():
            if name not in self._held_out:
                self._held_out[name] = InstanceMean(tuple(value.shape)).to(value.device)
            self._held_out[name].update(value, weight=f.shape[1])
        return losses

    def _end_held_out(self) -> None:
        self.log_dict({name: metric.compute().mean() for name, metric in self._held_out.items()})

    on_validation_epoch_start = _begin_held_out
    on_test_epoch_start = _begin_held_out

    def validation_step(self, batch: Tensor, batch_idx: int) -> Losses:
        """Losses of one held-out draw."""
        return self._held_out_step(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> Losses:
        """Losses of one held-out draw."""
        return self._held_out_step(batch)

    on_validation_epoch_end = _end_held_out
    on_test_epoch_end = _end_held_out


def _measurable(weights: Tensor) -> Tensor:
    """Weights in a precision that has decompositions: bfloat16 as float32, of which it is a part."""
    return weights.float() if weights.dtype in (torch.bfloat16, torch.float16) else weights


def _normal_heads(seeds: Sequence[int], N: int, D: int, H: int) -> tuple[Tensor, Tensor]:
    """Standard normal numbers for W_Q and W_K [I, H, D], one seed per instance."""
    pairs = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(D, N, generator=generator)  # random features are drawn first
        pairs.append([torch.randn(H, D, generator=generator) for _ in range(2)])
    W_Q, W_K = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return W_Q, W_K


def _importance(importance: PerInstance | list[list[float]], N: int, I: int) -> Float[Tensor, "I N"]:  # noqa: E741
    if isinstance(importance, list) and importance and isinstance(importance[0], list):
        rows: list[Any] = importance
        lengths = {len(row) for row in rows}
        if len(rows) not in (1, I) or lengths != {N}:
            raise InputError(
                f"importance has {len(rows)} rows of {sorted(lengths)} weights. Allowed: 1 or {I} rows (instances) of "
                f"{N} weights (features). Fix: change --model.importance."
            )
        weights = torch.stack([per_instance("importance", row, N, low=0) for row in rows]).expand(I, N)
        return weights.clone()
    decay = per_instance("importance", importance, I, low=0)  # type: ignore[arg-type]
    return decay[:, None] ** torch.arange(N, dtype=torch.float64)


def check_state_fits(model: ToyAttentionModel, state: Mapping[str, Tensor]) -> None:
    """Check that weights from a checkpoint fit a model.

    Raises:
        InputError: Names or shapes differ.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in state.items()}
    if expected != other:
        raise InputError(
            f"the checkpoint does not fit the model: it holds {other}, the model has {expected}. "
            "Fix: use the sizes of the run that made the checkpoint (its config.yaml)."
        )
