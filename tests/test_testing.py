"""The contracts that a user can run: our own modules and metrics keep them, and each way to break one is found."""

import random
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.replays import replay

from svf_lightning.callbacks import CausalAblation, Measured, ProbeMetric, Quantity, SVDAlignment
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.registry import METRICS
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.testing import check_metric, check_module, example_steps
from svf_lightning.toy import ToyAttentionModel

# ---- ours keep them


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_this_package_keeps_the_contract(name):
    check_metric(METRICS[name]())


@pytest.mark.parametrize(
    "metric",
    [SVDAlignment(relative_gap=0.5, significant=0.2, keep_vectors=False), CausalAblation(n_removed=2, report=(1, 2))],
    ids=lambda metric: type(metric).__name__,
)
def test_other_options_keep_it_too(metric):
    check_metric(metric)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_heads": 2, "template": "linear", "n_pairs": 3},
        {"rope": True, "context_length": 5},
        {"template": "zero"},
        {"init_features": "cone", "freeze": "features"},
        {"n_attended": 4, "n_observed": 3},
    ],
    ids=str,
)
def test_every_variant_of_the_toy_model_keeps_the_contract(options):
    check_module(ToyAttentionModel(n_features=11, d_model=6, n_instances=3, **options))


def test_the_replay_keeps_the_contract_for_the_checkpoint_that_it_shows(suite, tmp_path):
    class Check(pl.Callback):
        checked = 0

        def on_test_batch_end(self, trainer, module, *_):
            check_module(module)
            self.checked += 1

    check = Check()
    replay(FolderCheckpoints(str(suite), steps=[0, 8]), tmp_path / "run", callbacks=(check,))
    assert check.checked == 2 * 3  # batches of 13 prompts


def test_examples_show_every_kind_of_dimension_and_of_observation():
    steps = example_steps()
    assert {probes[0].batch_dims for probes in steps} >= {("instance",), ("instance", "head"), ("layer", "head")}
    assert any(probes[0].heads is None for probes in steps)
    assert any(probes[0].queries is not None for probes in steps)
    assert any(probes[0].scores is not None for probes in steps)
    for probes in steps:
        assert len({probe.step for probe in probes}) == len(probes)


# ---- ways to break the contract of a metric


class Good(ProbeMetric):
    """The length of the features: the metric that the ones below spoil."""

    quantities = (Quantity("norm/mean"), Quantity("norms", dims=("feature",)))

    def __init__(self, power: float = 2.0):
        self.power = power

    def norms(self, probe):
        return torch.linalg.vector_norm(probe.features, ord=self.power, dim=-2)

    def measure(self, probe):
        if probe.features is None:
            return {}
        norms = self.norms(probe)
        return {"norm/mean": norms.mean(-1), "norms": norms}


class Undeclared(Good):
    def measure(self, probe):
        return {"norm/sum": self.norms(probe).sum(-1)} if probe.features is not None else {}


class AnotherShape(Good):
    def measure(self, probe):
        return {"norm/mean": self.norms(probe)[..., None]} if probe.features is not None else {}


class ChangesTheProbe(Good):
    def measure(self, probe):
        if probe.features is not None:
            probe.features.mul_(2)
        return super().measure(probe)


class DrawsFromTorch(Good):
    def measure(self, probe):
        torch.rand(1)
        return super().measure(probe)


class DrawsFromNumpy(Good):
    def measure(self, probe):
        np.random.rand()  # noqa: NPY002
        return super().measure(probe)


class DrawsFromPython(Good):
    def measure(self, probe):
        random.random()
        return super().measure(probe)


class DependsOnOtherRows(Good):
    def norms(self, probe):
        return super().norms(probe) - super().norms(probe).mean(0)


class Remembers(Good):
    n_calls = 0

    def norms(self, probe):
        Remembers.n_calls += 1
        return super().norms(probe) + Remembers.n_calls


class NotFinite(Good):
    def norms(self, probe):
        return super().norms(probe) / 0


class Forgets(Good):
    def __init__(self, power: float = 2.0):
        self._p = power

    def norms(self, probe):
        return probe.features.norm(dim=-2)


class DeclaresTwice(Good):
    quantities = (*Good.quantities, Quantity("norms"))


class MeasuresNothing(Good):
    def measure(self, probe):
        return {}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Undeclared, r"measures 'norm/sum', which it does not declare\. Fix: add Quantity"),
        (AnotherShape, r"'norm/mean' has \d dimensions.*Fix"),
        (ChangesTheProbe, r"changes features of the probe of row 0\. Fix"),
        (DrawsFromTorch, "draws from a global random generator.*Fix"),
        (DrawsFromNumpy, "draws from a global random generator.*Fix"),
        (DrawsFromPython, "draws from a global random generator.*Fix"),
        (DependsOnOtherRows, "a row alone and among others: 'norm/mean' differs.*Fix"),
        (Remembers, "with the same arguments: 'norm/mean' differs.*Fix"),
        (NotFinite, "'norm/mean' is not finite"),
        (MeasuresNothing, "measures nothing of any probe.*Fix"),
    ],
)
def test_a_metric_that_breaks_its_contract_is_found_and_told_why(metric, message):
    np.random.rand()  # noqa: NPY002 (the next draw changes the position of the generator alone)
    check_metric(Good())
    with pytest.raises(AssertionError, match=message):
        check_metric(metric())


@pytest.mark.parametrize(
    ("metric", "message"), [(Forgets, "does not keep its argument 'power'"), (DeclaresTwice, "'norms'")]
)
def test_what_a_run_would_refuse_is_refused(metric, message):
    with pytest.raises(InputError, match=message):
        check_metric(metric())


def test_a_metric_may_say_which_dimensions_of_the_probe_a_value_has():
    class PerHead(ProbeMetric):
        quantities = (Quantity("head/norm"),)

        def measure(self, probe):
            if probe.batch_dims[1:] != ("layer", "head"):
                return {}
            norms = probe.heads.W_Q.flatten(-2).norm(dim=-1)
            return {"head/norm": Measured(norms.mean(-1), (), ("layer",))}

    check_metric(PerHead())


def test_probes_of_ones_own_are_looked_at():
    class OnlyTwoFeatures(Good):
        def measure(self, probe):
            return super().measure(probe) if probe.features.shape[-1] == 2 else {}

    probe = Probe(0, features=torch.ones(3, 4, 2), pairs=torch.zeros(0, 2, dtype=torch.int64))
    check_metric(OnlyTwoFeatures(), [probe, replace(probe, step=5)])


# ---- ways to break the contract of a module


class Mine(pl.LightningModule):
    """One layer of two heads over eleven features: the module that the ones below spoil."""

    def __init__(self, **changes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("W_Q", (1, 2, 3, 5)), ("W_K", (1, 2, 3, 5)), ("W", (5, 11))):
            setattr(self, name, torch.nn.Parameter(torch.randn(*shape, generator=generator)))
        self.changes = changes

    def probe(self):
        pairs = torch.tensor([[0, 1]])
        probe = Probe(
            self.global_step, AttentionHeads(self.W_Q, self.W_K), self.W, pairs, torch.ones(1, 2, 1),
            batch_dims=("layer", "head"), feature_dims=(),
        )  # fmt: skip
        return replace(probe, **self.changes)


class NoProbe(pl.LightningModule):
    pass


class AnotherKindOfProbe(Mine):
    def probe(self):
        return {"features": self.W}


class ChangesItsWeights(Mine):
    def probe(self):
        with torch.no_grad():
            self.W.mul_(1.5)
        return super().probe()


class DrawsForItsProbe(Mine):
    def probe(self):
        torch.rand(1)
        return super().probe()


class KeepsItsProbe(Mine):
    def probe(self):
        if not hasattr(self, "kept"):
            self.kept = super().probe().snapshot()
        return self.kept


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (NoProbe, r"NoProbe has no probe\(\)\. Fix"),
        (AnotherKindOfProbe, r"returns dict\. Fix"),
        (ChangesItsWeights, "changes W of the weights. Fix"),
        (DrawsForItsProbe, "draws from a global random generator"),
        (KeepsItsProbe, "does not follow the weights. Fix"),
        (lambda: Mine(pair_logits=torch.ones(1, 2)), r"pair_logits has shape \(1, 2\)\. Allowed: \[layer, head, P\]"),
        (lambda: Mine(features=torch.full((5, 11), torch.nan)), "features holds NaN or Inf"),
        (lambda: Mine(pairs=torch.tensor([[0, 11]])), r"pairs name features outside 0\.\.10"),
        (lambda: Mine(batch_dims=("step", "head")), "batch_dims hold 'step'"),
        (lambda: Mine(batch_dims=("head", "head")), "name a dimension twice"),
        (lambda: Mine(coords={"seed": (("head",), torch.zeros(3))}), "'seed' has size 3 along 'head'"),
    ],
)
def test_a_module_that_breaks_its_contract_is_found_and_told_why(module, message):
    check_module(Mine())
    with pytest.raises(AssertionError, match=message):
        check_module(module())


def test_a_module_that_declares_a_quantity_twice_is_refused():
    module = Mine()
    module.quantities = (Quantity("mine/norm"), Quantity("mine/norm"))
    with pytest.raises(InputError, match="'mine/norm'"):
        check_module(module)


def test_the_weights_are_afterwards_what_they_were():
    module = ToyAttentionModel(n_features=11, d_model=6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    check_module(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
