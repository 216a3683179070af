"""The toy model: a ReLU autoencoder and one attention head that share a feature matrix, I of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import InstanceMean
from svf_lightning.probe import Coordinate, Probe
from svf_lightning.toy.features import ToyData
from svf_lightning.toy.instances import PerInstance, at_least, instance_seeds, per_instance
from svf_lightning.toy.optimizer import InstanceAdam
from svf_lightning.toy.reconstruction import reconstruction_loss
from svf_lightning.toy.template import TemplateName, TemplatePairs, make_template
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
        n_features: N, number of features.
        d_model: D, dimension of a token; null for half of n_features.
        d_head: H, dimension of queries and keys of one head; null for d_model.
        n_heads: Heads whose logits are added.
        context_length: m, keys per query; only looked at with ``rope``. (Follows data.context_length on the command
            line.)
        n_instances: I, models that train side by side in one program.
        template: "single" (T_01 = a), "linear" (T_{i,i+P} from a down to a/P), "many_to_one" (T_{i,P} = a for i < P),
            "zero" (no head), or a list of (query feature, key feature, logit).
        n_pairs: P, target pairs of the templates linear and many_to_one.
        target_logit: a, the largest target logit. One value or one per instance; null for a list of pairs.
        lambda_attn: lambda, weight of the attention loss, >= 0. One value or one per instance.
        importance: Weight of features in the reconstruction loss. A number r weighs feature i by r**i (1 weighs all
            alike), one value or one per instance; a list of rows of N weights gives them one by one, one row for all
            instances or one per instance.
        seed: Seed of the initial weights; instance i uses seed + i, or the i-th of a list.
        init_features: Where W starts: "random", "orthonormal" (N <= D), "tight_frame" (N >= D), "cone" (a tight frame
            tilted towards one direction), or a .npy or .safetensors file with W [D, N] or [I, D, N], taken as it is.
        cone_strength: How far "cone" tilts the frame, >= 0. One value or one per instance.
        init_feature_norm: Root-mean-square length of the initial feature columns, > 0.
        init_head: Where the head starts: "random", "optimal" (least-squares optimum of the logits for the initial
            features, Theorem 1), "aligned" (its singular vectors are the initial features of the template), or a
            .safetensors file with W_Q and W_K [H, D] or [I, H, D], taken as it is.
        init_head_scale: Random W_Q and W_K keep lengths on average, times this factor, > 0.
        freeze: What keeps its initial values: "none", "features" (W and b; the head trains on given features) or
            "head" (features train under a given head).
        rope: Rotate queries and keys by their positions, halves of the head dimension paired, as in GPT-NeoX.
        rope_base: Base of the rotation's frequencies, > 1.
        target_position: Factor of the target logits at offset delta = 1..m, with ``rope``: "independent" (1), "decay"
            (exp(1 - delta)) or "nearest" (1 at offset 1, else 0).
        n_observed: Sequences of a fixed held-out draw whose queries and keys the probe shows to callbacks.
        n_attended: Held-out query-key pairs whose key carries the feature that the query attends to, shown by the probe
            for callbacks that decompose their scores.
        optimizer: "adam" or "adamw".
        learning_rate: Peak learning rate, > 0. One value or one per instance.
        weight_decay: Decoupled weight decay, >= 0; only with adamw.
        lr_schedule: "constant", or "cosine" or "linear" decay to 0 over trainer.max_steps.

    Raises:
        InputError: A setting out of range, or settings that do not fit each other.
    """

    def __init__(
        self,
        n_features: int = 20,
        d_model: int | None = 10,
        d_head: int | None = None,
        n_heads: int = 1,
        context_length: int = 8,
        n_instances: int = 1,
        template: TemplateName | TemplatePairs = "single",
        n_pairs: int = 1,
        target_logit: PerInstance | None = 5.0,
        lambda_attn: PerInstance = 10.0,
        importance: PerInstance | list[list[float]] = 1.0,
        seed: int | list[int] = 0,
        init_features: str = "random",
        cone_strength: PerInstance = 0.0,
        init_feature_norm: float = 0.1,
        init_head: str = "random",
        init_head_scale: float = 1.0,
        freeze: Literal["none", "features", "head"] = "none",
        rope: bool = False,
        rope_base: float = 10000.0,
        target_position: Literal["independent", "decay", "nearest"] = "independent",
        n_observed: int = 0,
        n_attended: int = 0,
        optimizer: Literal["adam", "adamw"] = "adam",
        learning_rate: PerInstance = 1e-3,
        weight_decay: float = 0.0,
        lr_schedule: Literal["constant", "cosine", "linear"] = "constant",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        N = at_least("n_features", n_features, 1, key="model.n_features")
        D = at_least("d_model", N // 2 if d_model is None else d_model, 1, key="model.d_model")
        H = at_least("d_head", D if d_head is None else d_head, 1, key="model.d_head")
        I = at_least("n_instances", n_instances, 1, key="model.n_instances")  # noqa: E741 (the method's symbol)
        self.n_features, self.d_model, self.d_head, self.n_instances = N, D, H, I
        self.n_heads = at_least("n_heads", n_heads, 1, key="model.n_heads")
        self.context_length = at_least("context_length", context_length, 0, key="data.context_length")
        self.template = make_template(
            template, n_features=N, n_instances=I, n_pairs=n_pairs, target_logit=target_logit
        )  # fmt: skip
        self.has_head = len(self.template.pairs) > 0
        self.seeds = instance_seeds(seed, I, key="model.seed")
        _one_of("optimizer", optimizer, ("adam", "adamw"))
        _one_of("lr_schedule", lr_schedule, ("constant", "cosine", "linear"))
        _one_of("freeze", freeze, ("none", "features", "head"))
        _one_of("target_position", target_position, ("independent", "decay", "nearest"))
        if freeze != "none" and not self.has_head:
            raise bad_value("freeze", freeze, "'none' without a head", "use another template")
        if target_position != "independent" and not rope:
            raise bad_value("target_position", target_position, "'independent' without rope", "set --model.rope=true")
        if rope and H % 2:
            raise bad_value("d_head", H, "an even number with rope", "change --model.d_head")
        self.n_observed = at_least("n_observed", n_observed, 0, key="model.n_observed")
        self._observed: Tensor | None = None
        self.n_attended = at_least("n_attended", n_attended, 0, key="model.n_attended")
        self._attended: tuple[Tensor, Tensor] | None = None
        if n_attended and (rope or not self.has_head):
            raise bad_value("n_attended", n_attended, "0 with rope or without a head", "set --model.n_attended=0")
        per_instance("rope_base", rope_base, 1, low=1, open_low=True)
        self.rope, self.rope_base, self.target_position = rope, rope_base, target_position
        self.learning_rates = per_instance("learning_rate", learning_rate, I, low=0, open_low=True)
        per_instance("weight_decay", weight_decay, 1, low=0)
        if weight_decay and optimizer == "adam":
            raise bad_value("weight_decay", weight_decay, "0 with adam", "set --model.optimizer=adamw")
        self.optimizer_name, self.weight_decay, self.lr_schedule = optimizer, weight_decay, lr_schedule
        lambdas = per_instance("lambda_attn", lambda_attn, I, low=0)
        weights = _importance(importance, N, I)
        self._weigh_features = bool((weights != 1).any())
        # settings, not weights: they follow the device and stay out of the checkpoint
        self.register_buffer("lambda_attn", lambdas.float(), persistent=False)
        self.register_buffer("importance", weights.float(), persistent=False)
        self.register_buffer("pairs", self.template.pairs, persistent=False)
        self.register_buffer("pair_logits", self.template.logits, persistent=False)
        self.lambda_attn: Tensor
        self.importance: Tensor
        self.pairs: Tensor
        self.pair_logits: Tensor

        for name, value in (("init_feature_norm", init_feature_norm), ("init_head_scale", init_head_scale)):
            per_instance(name, value, 1, low=0, open_low=True)
        strengths = per_instance("cone_strength", cone_strength, I, low=0)
        W = initial_features(init_features, n_features=N, d_model=D, seeds=self.seeds, cone_strength=strengths)
        if init_features in FEATURE_KINDS:
            W = W * init_feature_norm
        self.W = nn.Parameter(W.float(), requires_grad=freeze != "features")  # [I, D, N]
        self.b = nn.Parameter(torch.zeros(I, N), requires_grad=freeze != "features")
        if self.has_head:
            rows = self.n_heads * H  # heads that add up their logits are one head with all their rows
            if init_head == "random":
                W_Q, W_K = (w * (init_head_scale / H**0.5) for w in _normal_heads(self.seeds, N, D, rows))
            else:
                W_Q, W_K = initial_head(init_head, features=W, template=self.template, d_head=rows)
            self.W_Q = nn.Parameter(W_Q.float(), requires_grad=freeze != "head")  # [I, n_heads * H, D]
            self.W_K = nn.Parameter(W_K.float(), requires_grad=freeze != "head")
        coords: dict[str, Coordinate] = {"seed": (("instance",), self.seeds), "lambda_attn": (("instance",), lambdas)}
        if init_features == "cone":
            coords["cone_strength"] = (("instance",), strengths)
        if rope:
            coords["offset"] = (("offset",), range(1, self.context_length + 1))
        if self.has_head:
            coords["query_feature"] = (("pair",), self.template.pairs[:, 0])
            coords["key_feature"] = (("pair",), self.template.pairs[:, 1])
            coords["target_logit"] = (("instance", "pair"), self.template.logits)
            if rope:  # it depends on the offset
                factor = self._position_factor(torch.arange(1, self.context_length + 1))
                coords["target_logit"] = (
                    ("instance", "offset", "pair"),
                    self.template.logits[:, None] * factor[:, None],
                )
        self._coords = coords
        self._loaded_step = 0
        self._held_out: dict[str, InstanceMean] = {}

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
        if self.rope:
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
        if self.rope:
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
        logits: Tensor = (query * rotate(keys, -offsets[:, None], base=self.rope_base)).sum((-1, -2))
        return logits

    def _position_factor(self, offsets: Tensor) -> Tensor:
        """What the target logits are multiplied with at each offset."""
        if self.target_position == "decay":
            return torch.exp(1.0 - offsets)
        if self.target_position == "nearest":
            return (offsets == 1).float()
        return torch.ones_like(offsets, dtype=torch.float32)

    def target_logits(self, f: Float[Tensor, "J B m1 N"]) -> Float[Tensor, "I B m"]:
        """``f_r^T T f_{s_j}`` for every key j, from the non-zero entries of T alone."""
        products = f[:, :, :1, self.pairs[:, 0]] * f[:, :, 1:, self.pairs[:, 1]]  # [J, B, m, P]
        weights = self.pair_logits.expand(self.n_instances, -1).reshape(len(f), self.n_instances // len(f), -1)
        logits = torch.einsum("jbmp,jkp->jkbm", products, weights).flatten(0, 1)
        if self.target_position == "independent":
            return logits
        return logits * self._position_factor(torch.arange(logits.shape[-1], 0, -1, device=logits.device))

    def losses(self, f: Float[Tensor, "J B m1 N"]) -> Losses:
        """``loss/recon``, ``loss/attn`` (with a head) and ``loss/total``, one value per instance [I], in nats."""
        flat = f.flatten(1, 2)
        recon = reconstruction_loss(self.W, self.b, flat, self.importance if self._weigh_features else None)
        if not self.has_head:
            return {"loss/recon": recon, "loss/total": recon}
        logits = self._logits(f)
        target = self.target_logits(f).softmax(-1)
        attn = -(target * F.log_softmax(logits, -1)).sum((1, 2)) / logits.shape[1]
        return {"loss/recon": recon, "loss/attn": attn, "loss/total": recon + self.lambda_attn * attn}

    def probe(self) -> Probe:
        """Heads and features as they are now.

        The leading dimension of the features is "instance"; the heads also have "head", if there are several, and
        "offset" with rope.
        """
        step = max(self.global_step, self._loaded_step)
        if not self.has_head:
            return Probe(step, features=self.W, coords=self._coords)
        queries = keys = None
        if self._observed is not None:
            tokens = self._observed @ self.W.mT[:, None]
            queries, keys = tokens[:, :, 0], tokens[:, :, 1:]
        attended = [None, None] if self._attended is None else [f @ self.W.mT for f in self._attended]
        W_Q: Tensor = self.W_Q
        W_K: Tensor = self.W_K
        logits = self.pair_logits
        batch_dims: tuple[str, ...] = ("instance",)
        if self.n_heads > 1:
            W_Q, W_K = (w.view(len(w), self.n_heads, self.d_head, self.d_model) for w in (W_Q, W_K))
            logits = logits[:, None].expand(-1, self.n_heads, -1)
            batch_dims += ("head",)
        if self.rope:
            offsets = torch.arange(1, self.context_length + 1, device=W_K.device)
            W_K = rotate(W_K.mT[..., None, :, :], -offsets[:, None], base=self.rope_base).mT  # [..., m, H, D]
            W_Q = W_Q[..., None, :, :].expand_as(W_K)
            logits = logits[..., None, :] * self._position_factor(offsets)[:, None]
            batch_dims += ("offset",)
        return Probe(
            step,
            heads=AttentionHeads(W_Q, W_K),
            features=self.W,
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
        if self.n_observed and isinstance(data, ToyData):
            self._observed = data.observed(self.n_observed, device=self.device)
        if self.n_attended and isinstance(data, ToyData):
            self._attended = data.attended(self.pairs, self.n_attended, device=self.device)

    def check(self, trainer: pl.Trainer, data: object, stage: str) -> None:
        """Check that trainer and data fit the model, before anything is written.

        Raises:
            InputError: A trainer option that would change what a step means, or a head without keys.
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
        if isinstance(data, ToyData) and self.has_head and data.context_length < 1:
            raise bad_value(
                "context_length", data.context_length, "at least 1 with a head", "change --data.context_length"
            )
        if isinstance(data, ToyData) and self.rope and data.context_length != self.context_length:
            raise bad_value(
                "model.context_length", self.context_length, f"{data.context_length}, as in the data", "give both alike"
            )
        if self.lr_schedule != "constant" and stage == "fit" and trainer.max_steps < 1:
            raise bad_value(
                "trainer.max_steps", trainer.max_steps, f"at least 1 with lr_schedule={self.lr_schedule}", "set it"
            )

    def on_fit_start(self) -> None:
        """Count steps with the trainer."""
        self._loaded_step = 0

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember which training step the weights stand for (``test`` does not restore the trainer's counter)."""
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Losses:
        """Losses of one draw; ``loss`` is their sum over instances."""
        losses = self.losses(batch)
        return {"loss": losses["loss/total"].sum(), **losses}

    @torch.no_grad()
    def current_losses(self) -> Losses:
        """Losses of the current weights on the draw of the current step: what the next training step would see."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ToyData):
            return {}
        return self.losses(data.draw(self.trainer.global_step, device=self.device))

    def configure_optimizers(self) -> Any:
        """Adam or AdamW with the schedule, stepped after every update."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {
            "weight_decay": self.weight_decay,
            "decoupled_weight_decay": self.optimizer_name == "adamw",
        }
        rates = self.learning_rates
        optimizer: torch.optim.Optimizer
        if bool((rates == rates[0]).all()):
            optimizer = torch.optim.Adam(trained, lr=rates[0].item(), fused=True, **options)
        else:
            optimizer = InstanceAdam(trained, rates, **options)
        if self.lr_schedule == "constant":
            return optimizer
        total = self.trainer.max_steps
        if self.lr_schedule == "cosine":
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


def _normal_heads(seeds: Sequence[int], N: int, D: int, H: int) -> tuple[Tensor, Tensor]:
    """Standard normal numbers for W_Q and W_K [I, H, D], one seed per instance."""
    pairs = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        torch.randn(D, N, generator=generator)  # the numbers of random features come first
        pairs.append([torch.randn(H, D, generator=generator) for _ in range(2)])
    W_Q, W_K = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return W_Q, W_K


def rotate(x: Float[Tensor, "... H"], positions: Float[Tensor, "..."], *, base: float) -> Float[Tensor, "... H"]:
    """Rotary position embedding (Su et al. 2021): component k turns with component k + H/2, as in GPT-NeoX.

    Args:
        x: Vectors; H is even.
        positions: Positions [...], broadcast against the leading dimensions of x.
        base: Component pair k turns by ``position * base^(-2k/H)`` radians.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise bad_value(name, value, ", ".join(allowed), f"change --model.{name}")


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
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in state.items()}
    if own != other:
        raise InputError(
            f"the checkpoint does not fit the model: it holds {other}, the model has {own}. "
            "Fix: use the sizes of the run that made the checkpoint (its config.yaml)."
        )
