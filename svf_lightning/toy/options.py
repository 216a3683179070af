"""All settings of the toy model, grouped by what they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svf_lightning.errors import bad_value
from svf_lightning.toy.instances import PerInstance, at_least, check_memory, per_instance
from svf_lightning.toy.template import TemplateName, TemplatePairs

Freeze = Literal["none", "features", "head"]
Position = Literal["independent", "decay", "nearest"]
Optimizer = Literal["adam", "adamw"]
Schedule = Literal["constant", "cosine", "linear"]


class _Checked:
    """Each group checks its own settings when it is made."""

    def __post_init__(self) -> None:
        """Raises InputError for a setting out of range."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(_Checked):
    """The features W [D, N]: how many, how much each counts, and where they start.

    Args:
        n_features: N, number of features.
        d_model: D, dimension of a token; null for half of n_features.
        importance: Weight of features in the reconstruction loss. A number r weighs feature i by r**i (1 weighs all
            alike), one value or one per instance; a list of rows of N weights gives them one by one, one row for all
            instances or one per instance.
        init_features: Where W starts: "random", "orthonormal" (N <= D), "tight_frame" (N >= D), "cone" (a tight frame
            tilted towards one direction), or a .npy or .safetensors file with W [D, N] or [I, D, N], taken as it is.
        cone_strength: How far "cone" tilts the frame, >= 0. One value or one per instance.
        init_feature_norm: Root-mean-square length of the initial feature columns, > 0.
    """

    n_features: int = 20
    d_model: int | None = 10
    importance: PerInstance | list[list[float]] = 1.0
    init_features: str = "random"
    cone_strength: PerInstance = 0.0
    init_feature_norm: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_features", self.n_features, 1, key="model.n_features")
        per_instance("init_feature_norm", self.init_feature_norm, 1, low=0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class HeadOptions(_Checked):
    """The attention heads W_Q, W_K [H, D]: sizes, positions, and where they start.

    Args:
        d_head: H, dimension of queries and keys of one head; null for d_model.
        n_heads: Heads whose logits are added.
        init_head: Where the head starts: "random", "optimal" (least-squares optimum of the logits for the initial
            features, Theorem 1), "aligned" (its singular vectors are the initial features of the template), or a
            .safetensors file with W_Q and W_K [H, D] or [I, H, D], taken as it is.
        init_head_scale: Random W_Q and W_K keep lengths on average, times this factor, > 0.
        rope: Rotate queries and keys by their positions, halves of the head dimension paired, as in GPT-NeoX.
        rope_base: Base of the rotation's frequencies, > 1.
    """

    d_head: int | None = None
    n_heads: int = 1
    init_head: str = "random"
    init_head_scale: float = 1.0
    rope: bool = False
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_heads", self.n_heads, 1, key="model.n_heads")
        per_instance("init_head_scale", self.init_head_scale, 1, low=0, open_low=True)
        per_instance("rope_base", self.rope_base, 1, low=1, open_low=True)


@dataclass(frozen=True, kw_only=True)
class TargetOptions(_Checked):
    """The template T: which pairs of features the head is to attend to, and how strongly.

    Args:
        template: "single" (T_01 = a), "linear" (T_{i,i+P} from a down to a/P), "many_to_one" (T_{i,P} = a for i < P),
            "zero" (no head), or a list of (query feature, key feature, logit).
        n_pairs: P, target pairs of the templates linear and many_to_one.
        target_logit: a, the largest target logit. One value or one per instance; null for a list of pairs.
        target_position: Factor of the target logits at offset delta = 1..m, with ``rope``: "independent" (1), "decay"
            (exp(1 - delta)) or "nearest" (1 at offset 1, else 0).
    """

    template: TemplateName | TemplatePairs = "single"
    n_pairs: int = 1
    target_logit: PerInstance | None = 5.0
    target_position: Position = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_pairs", self.n_pairs, 1, key="model.n_pairs")
        _one_of("target_position", self.target_position, Position)


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(_Checked):
    """What is trained, on which loss, and how.

    Args:
        lambda_attn: lambda, weight of the attention loss, >= 0. One value or one per instance.
        freeze: What keeps its initial values: "none", "features" (W and b; the head trains on given features) or
            "head" (features train under a given head).
        optimizer: "adam" or "adamw".
        learning_rate: Peak learning rate, > 0. One value or one per instance.
        weight_decay: Decoupled weight decay, >= 0; only with adamw.
        lr_schedule: "constant", or "cosine" or "linear" decay to 0 over trainer.max_steps.
    """

    lambda_attn: PerInstance = 10.0
    freeze: Freeze = "none"
    optimizer: Optimizer = "adam"
    learning_rate: PerInstance = 1e-3
    weight_decay: float = 0.0
    lr_schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("freeze", self.freeze, Freeze)
        _one_of("optimizer", self.optimizer, Optimizer)
        _one_of("lr_schedule", self.lr_schedule, Schedule)
        per_instance("weight_decay", self.weight_decay, 1, low=0)
        if self.weight_decay and self.optimizer == "adam":
            raise bad_value("weight_decay", self.weight_decay, "0 with adam", "set --model.optimizer=adamw")


@dataclass(frozen=True, kw_only=True)
class ObservationOptions(_Checked):
    """Tokens that the probe shows to callbacks.

    Args:
        n_observed: Sequences of a fixed held-out draw whose queries and keys the probe shows.
        n_attended: Held-out query-key pairs whose key carries the feature that the query attends to, shown for
            callbacks that decompose their scores.
    """

    n_observed: int = 0
    n_attended: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_observed", self.n_observed, 0, key="model.n_observed")
        at_least("n_attended", self.n_attended, 0, key="model.n_attended")


@dataclass(frozen=True, kw_only=True)
class ToyOptions(ObservationOptions, OptimizationOptions, TargetOptions, HeadOptions, FeatureOptions):
    """All settings of :class:`svf_lightning.toy.ToyAttentionModel`, whose keyword arguments are these fields.

    Args:
        n_instances: I, models that train side by side in one program.
        context_length: m, keys per query; only looked at with ``rope``. (Follows data.context_length on the command
            line.)
        seed: Seed of the initial weights; instance i uses seed + i, or the i-th of a list.

    Raises:
        InputError: A setting out of range, or settings that do not fit each other.
    """

    n_instances: int = 1
    context_length: int = 8
    seed: int | list[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_instances", self.n_instances, 1, key="model.n_instances")
        at_least("context_length", self.context_length, 0, key="data.context_length")
        at_least("d_model", self.D, 1, key="model.d_model")
        at_least("d_head", self.H, 1, key="model.d_head")
        n_weights = self.n_instances * self.D * (self.n_features + 2 * self.n_heads * self.H)
        # they are drawn in float64; trained are weights, gradients and two moments in float32
        check_memory("the model", 16 * n_weights, "--model.n_instances, --model.n_features, --model.d_model or d_head")
        if self.rope and self.H % 2:
            raise bad_value("d_head", self.H, "an even number with rope", "change --model.d_head")
        has_head = self.template not in ("zero", [])
        if self.freeze != "none" and not has_head:
            raise bad_value("freeze", self.freeze, "'none' without a head", "use another template")
        if self.target_position != "independent" and not self.rope:
            raise bad_value(
                "target_position", self.target_position, "'independent' without rope", "set --model.rope=true"
            )
        if self.n_attended and (self.rope or not has_head):
            raise bad_value("n_attended", self.n_attended, "0 with rope or without a head", "set --model.n_attended=0")

    @property
    def D(self) -> int:
        """Dimension of a token."""
        return self.n_features // 2 if self.d_model is None else self.d_model

    @property
    def H(self) -> int:
        """Dimension of the queries and keys of one head."""
        return self.D if self.d_head is None else self.d_head


def _one_of(name: str, value: str, choices: object) -> None:
    allowed: tuple[str, ...] = getattr(choices, "__args__", ())
    if value not in allowed:
        raise bad_value(name, value, ", ".join(allowed), f"change --model.{name}")
