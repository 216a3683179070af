"""Feature activations: sparse draws keyed by (seed, step), and the DataModule that serves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.draws import keyed_generator
from svf_lightning.errors import bad_value
from svf_lightning.toy.instances import PerInstance, at_least, check_memory, instance_seeds, per_instance

# numbers of the streams of draws, part of the generator's key
_TRAIN, _VALIDATE, _TEST, _OBSERVE = 0, 1, 2, 3
LEAST_PROBABILITY = 2.0**-23  # uniform numbers are multiples of 2^-24 below 1
_SEARCHED_DRAWS = 256  # for pairs with an attended feature


def sparse_activations(
    uniform: Float[Tensor, "... N"],
    probability: float | Float[Tensor, " N"],
    *,
    out: Float[Tensor, "... N"] | None = None,
) -> Float[Tensor, "... N"]:
    """``relu((u - (1 - p)) / p)``: Bernoulli(p) times Uniform(0, 1), from one uniform draw u (method, section 1).

    Args:
        uniform: u, in [0, 1).
        probability: p in (0, 1], one for all features or one each.
        out: Where to put the activations.
    """
    if isinstance(probability, Tensor):
        each = probability.to(uniform)
        return torch.sub(uniform, 1 - each, out=out).div_(each).relu_()
    p = np.float32(probability)  # shared as the uniform numbers are
    return torch.sub(uniform, float(1 - p), out=out).div_(float(p)).relu_()


def correlated_uniform(
    uniform: Float[Tensor, "... N"], shared: Float[Tensor, "..."], correlation: float
) -> Float[Tensor, "... N"]:
    """Uniform numbers of one token that rise and fall together: a Gaussian copula with one factor.

    ``Phi(sqrt(rho) z + sqrt(1 - rho) Phi^-1(u_i))`` with one normal z per token: each is uniform by itself, and the
    normal numbers behind any two of them have the correlation rho. Activations made of them
    (:func:`sparse_activations`) keep their probabilities; two features of probability p are active together with the
    orthant probability ``P(g_i > t, g_j > t)``, ``t = Phi^-1(1 - p)``, of a bivariate normal distribution.

    Args:
        uniform: u, independent, in [0, 1).
        shared: z, standard normal, one per token.
        correlation: rho, in [0, 1).
    """
    own = torch.special.ndtri(uniform)  # -inf for 0, which stays 0
    mixed: Tensor = torch.special.ndtr(own.mul_((1 - correlation) ** 0.5).add_((correlation**0.5 * shared)[..., None]))
    return mixed


class _Draw(NamedTuple):
    """What turns uniform numbers into the activations of an instance."""

    probability: float
    decay: float
    correlation: float

    def probabilities(self, n_features: int) -> float | Float[Tensor, " N"]:
        """Probability that a feature is active: one for all, or one each."""
        if not self.decay:
            return self.probability
        return self.probability * torch.arange(1, n_features + 1, dtype=torch.float64) ** -self.decay


class ToyData(pl.LightningDataModule):
    """Endless training draws, and held-out draws for ``validate`` and ``test``.

    A batch is a tensor of feature activations f [J, B, 1 + m, N]; position 0 is the query, 1..m are the keys. J divides
    I, and I / J consecutive instances see the very same numbers (J = 1: all of them).

    The draw of step t depends on (seed, t) and the device type alone, so an interrupted run sees the same data.

    Args:
        n_features: N. (Follows model.n_features on the command line.)
        n_instances: I. (Follows model.n_instances on the command line.)
        batch_size: B, sequences per training step.
        context_length: m, keys per query; 0 for a template without a head.
        feature_probability: p, probability that a feature is active in a token, in (0, 1]. One value or one per
            instance.
        frequency_decay: z, how much rarer later features are: feature i (from 0) is active with probability
            ``p (i + 1)^-z``, >= 0. Attended features are the first ones of most templates, so they are frequent. One
            value or one per instance.
        feature_correlation: rho, in [0, 1): how much features are active together (a Gaussian copula with one factor,
            :func:`correlated_uniform`); their probabilities stay. One value or one per instance.
        seed: Seed of the draws; with separate streams, instance i uses seed + i, or the i-th of a list. Instances with
            the same seed see one stream.
        streams: "shared": all instances see one stream of draws, each with its own p, so that differences between
            them owe nothing to sampling noise. "separate": each instance draws its own data, from its own seed.
        held_out_batches: Batches of ``batch_size`` sequences that ``validate`` and ``test`` average over.
    """

    def __init__(
        self,
        n_features: int = 20,
        n_instances: int = 1,
        batch_size: int = 256,
        context_length: int = 8,
        feature_probability: PerInstance = 0.1,
        frequency_decay: PerInstance = 0.0,
        feature_correlation: PerInstance = 0.0,
        seed: int | list[int] = 0,
        streams: Literal["shared", "separate"] = "shared",
        held_out_batches: int = 16,
    ) -> None:
        super().__init__()
        self.n_features = at_least("n_features", n_features, 1, key="model.n_features")
        self.n_instances = at_least("n_instances", n_instances, 1, key="model.n_instances")
        self.batch_size = at_least("batch_size", batch_size, 1, key="data.batch_size")
        self.context_length = at_least("context_length", context_length, 0, key="data.context_length")
        self.held_out_batches = at_least("held_out_batches", held_out_batches, 1, key="data.held_out_batches")
        n_activations = self.batch_size * (1 + self.context_length) * self.n_features
        check_memory("a batch", 4 * n_activations, "--data.batch_size, --data.context_length or --model.n_features")
        self.feature_probability = per_instance(
            "feature_probability", feature_probability, n_instances, low=0, high=1, open_low=True,
            key="data.feature_probability",
        )  # fmt: skip
        if (never := self.feature_probability[self.feature_probability < LEAST_PROBABILITY]).numel():
            raise bad_value(
                "feature_probability",
                f"{never[0].item():g}",
                f"at least {LEAST_PROBABILITY:g}, below which no float32 is above 1 - p and no feature ever active",
                "raise --data.feature_probability",
            )
        self.frequency_decay = per_instance(
            "frequency_decay", frequency_decay, n_instances, low=0, key="data.frequency_decay"
        )
        rarest = self.feature_probability * float(n_features) ** -self.frequency_decay
        if (too_rare := rarest < LEAST_PROBABILITY).any():
            raise bad_value(
                "frequency_decay",
                f"{self.frequency_decay[too_rare][0].item():g}",
                f"one that leaves the last of {n_features} features a probability of {LEAST_PROBABILITY:g} or more",
                "lower --data.frequency_decay, or raise --data.feature_probability",
            )
        self.feature_correlation = per_instance(
            "feature_correlation", feature_correlation, n_instances, low=0, high=1, key="data.feature_correlation"
        )
        if bool((self.feature_correlation == 1).any()):
            raise bad_value(
                "feature_correlation", 1.0, "a number in [0, 1)", "lower --data.feature_correlation: at 1 all features "
                "are active at once"
            )  # fmt: skip
        if streams not in ("shared", "separate"):
            raise bad_value("streams", streams, "'shared' or 'separate'", "change --data.streams")
        if streams == "shared" and not isinstance(seed, int):
            raise bad_value(
                "data.seed", seed, "one integer, as all instances share one stream", "set --data.streams=separate"
            )
        self.seeds: Sequence[int] = (
            instance_seeds(seed, n_instances, key="data.seed")
            if streams == "separate"
            else instance_seeds(seed, 1, key="data.seed")
        )
        self.streams = streams
        seeds = list(self.seeds) * (n_instances if streams == "shared" else 1)
        kinds = (self.feature_probability, self.frequency_decay, self.feature_correlation)
        draws = [_Draw(*values) for values in zip(*(kind.tolist() for kind in kinds), strict=True)]
        settings = list(zip(seeds, draws, strict=True))
        # instances with the same seed and the same settings see the same numbers: these are drawn once
        distinct = list(dict.fromkeys(settings))
        draw_of = [distinct.index(setting) for setting in settings]
        per_draw = n_instances // len(distinct)
        if draw_of != [i // per_draw for i in range(n_instances)]:  # the groups are unequal
            distinct = settings
        self.n_draws = len(distinct)
        self._draws_of_seed: dict[int, list[tuple[int, float | Tensor, float]]] = {seed: [] for seed, _ in distinct}
        for j, (draw_seed, kind) in enumerate(distinct):
            self._draws_of_seed[draw_seed].append((j, kind.probabilities(self.n_features), kind.correlation))

    def draw(self, step: int, *, device: torch.device | str = "cpu", stream: int = _TRAIN) -> Float[Tensor, "J B m1 N"]:
        """The activations of one step [J, B, 1 + m, N], float32 in [0, 1]."""
        shape = (self.batch_size, 1 + self.context_length, self.n_features)
        f = torch.empty(self.n_draws, *shape, device=device)
        for seed, draws in self._draws_of_seed.items():
            generator = keyed_generator(seed, stream, step, device=device)
            uniform = torch.rand(shape, generator=generator, device=device)
            shared = None
            for j, p, correlation in draws:
                own = uniform
                if correlation:
                    if shared is None:  # drawn after all others, which are what they are without it
                        shared = torch.randn(shape[:-1], generator=generator, device=device)
                    own = correlated_uniform(uniform, shared, correlation)
                sparse_activations(own, p, out=f[j])
        return f

    def _per_instance(self, f: Float[Tensor, "J ..."]) -> Float[Tensor, "I ..."]:
        """What each instance sees, or [1, ...] where all see the same."""
        return f if len(f) == 1 else f.repeat_interleave(self.n_instances // len(f), 0)

    def observed(self, n_sequences: int, *, device: torch.device | str = "cpu") -> Float[Tensor, "I n m1 N"]:
        """Activations of the first sequences of a held-out draw that is the same in every run of this seed.

        Raises:
            InputError: More sequences than a batch has.
        """
        if n_sequences > self.batch_size:
            raise bad_value(
                "n_observed", n_sequences, f"at most data.batch_size={self.batch_size}", "change --model.n_observed"
            )
        return self._per_instance(self.draw(0, device=device, stream=_OBSERVE)[:, :n_sequences])

    def attended(
        self, pairs: Int[Tensor, "P 2"], n_attended: int, *, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "I n N"], Float[Tensor, "I n N"]]:
        """Query-key pairs of held-out draws in which the key carries the feature that the query attends to.

        Args:
            pairs: Attended pairs (query feature, key feature).
            n_attended: n, pairs to find; the first ones of the draws that :meth:`observed` begins with.
            device: Where to put them.

        Returns:
            Activations of the queries, and of their keys minus the mean of the other keys [I or 1, n, N].

        Raises:
            InputError: The draws hold too few such pairs, or there are no other keys.
        """
        if self.context_length < 2:
            raise bad_value(
                "context_length", self.context_length, "at least 2, to compare keys", "raise --data.context_length"
            )
        query_feature, key_feature = pairs.to(device).unbind(-1)
        pairs_of: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(1 if self.n_draws == 1 else self.n_instances)]
        for step in range(_SEARCHED_DRAWS):
            f = self._per_instance(self.draw(step, device=device, stream=_OBSERVE))
            query, keys = f[:, :, 0], f[:, :, 1:]
            relative = keys - (keys.sum(2, keepdim=True) - keys) / (keys.shape[2] - 1)
            # [I, B, m]: some pair (i, j) with feature i in the query and feature j in the key
            attends = ((query[:, :, None, query_feature] > 0) & (keys[..., key_feature] > 0)).any(-1)
            for instance, where in enumerate(attends):
                batch, key = where.nonzero().unbind(-1)
                pairs_of[instance].append((query[instance, batch], relative[instance, batch, key]))
            if all(sum(map(len, (q for q, _ in one))) >= n_attended for one in pairs_of):
                queries, relatives = (
                    torch.stack([torch.cat([part[side] for part in one])[:n_attended] for one in pairs_of])
                    for side in (0, 1)
                )
                return queries, relatives
        raise bad_value(
            "n_attended",
            n_attended,
            f"fewer: {_SEARCHED_DRAWS} draws hold too few keys with an attended feature",
            "lower --model.n_attended, or raise --data.feature_probability",
        )

    def train_dataloader(self) -> Draws:
        """Draws from the current step on, without end."""
        return Draws(self, _TRAIN, None)

    def val_dataloader(self) -> Draws | list[Any]:
        """Held-out draws; none inside ``fit``, where every training batch is drawn afresh and never seen again."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        return Draws(self, _VALIDATE, self.held_out_batches)

    def test_dataloader(self) -> Draws:
        """Held-out draws, others than those of ``validate``."""
        return Draws(self, _TEST, self.held_out_batches)

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        """The batch as it is: it was drawn on the device."""
        return batch


class Draws:
    """Iterable over the draws of one stream; the training stream starts at the trainer's step.

    Args:
        data: Where the draws come from.
        stream: Which stream.
        length: Number of batches, or None for no end.
    """

    def __init__(self, data: ToyData, stream: int, length: int | None) -> None:
        self.data, self.stream, self.length = data, stream, length

    def __iter__(self) -> Iterator[Tensor]:
        trainer = self.data.trainer
        device = trainer.strategy.root_device if trainer is not None else torch.device("cpu")
        first = trainer.global_step if trainer is not None and self.stream == _TRAIN else 0
        step = first
        while self.length is None or step - first < self.length:
            yield self.data.draw(step, device=device, stream=self.stream)
            step += 1

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: The stream has no end (Lightning's sign for an unsized loader).
        """
        if self.length is None:
            raise TypeError("training draws have no end")
        return self.length
