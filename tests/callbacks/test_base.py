"""What every callback can rely on: one driver per trainer, options that tell rows apart, and an end for every sink."""

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import make_trainer, train

from svf_lightning.callbacks import (
    Capture,
    FeatureOrthogonality,
    PairSharing,
    ProbeMetric,
    Quantity,
    RowSink,
    SVDAlignment,
    quantities_of,
)
from svf_lightning.callbacks.base import Driver, class_path
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.registry import METRICS
from svf_lightning.toy import ToyAttentionModel, ToyData

# ---- metrics


class Norms(ProbeMetric):
    """A metric of a user."""

    quantities = (Quantity("norm/mean", "mean length of the features"),)

    def __init__(self, power: float = 2.0, *, keep: bool = False):
        self.power, self.keep = power, keep

    def measure(self, probe):
        return {"norm/mean": probe.features.norm(dim=-2, p=self.power).mean(-1)}


def test_the_options_of_a_metric_are_its_arguments_also_those_with_a_default():
    assert Norms(3.0).options() == {"power": 3.0, "keep": False}


def test_a_metric_that_forgets_an_argument_is_told_so():
    class Forgetful(Norms):
        def __init__(self, exponent: float = 2.0):
            super().__init__(exponent)

    with pytest.raises(InputError, match=r"Forgetful does not keep its argument 'exponent'.*Fix: set self\.exponent"):
        Forgetful().options()


def test_the_path_of_a_class_is_what_to_type_to_add_it():
    assert class_path(SVDAlignment) == "svf_lightning.callbacks.SVDAlignment"
    assert class_path(Norms) == f"{__name__}.Norms"
    assert class_path(ToyAttentionModel) == "svf_lightning.toy.model.ToyAttentionModel"


def test_what_a_run_measures_is_what_its_module_and_its_metrics_declare():
    class Module(pl.LightningModule):
        quantities = (Quantity("loss/extra", "another loss"),)

    found = quantities_of([SVDAlignment(), pl.Callback(), Norms()], Module())
    assert found["loss/extra"].provider == f"{__name__}.{Module.__qualname__}"
    assert found["spectrum/sigma_1"].provider == "svf_lightning.callbacks.SVDAlignment"
    assert found["dynamics/t_align"].provider == "svf_lightning.callbacks.SVDAlignment"  # what follows from it
    assert found["norm/mean"].label == "mean length of the features"
    assert "loss/total" in found  # of every module
    assert "orthogonality/interference" not in found


def test_two_that_measure_one_quantity_are_refused_by_their_names():
    class Rival(Norms):
        pass

    with pytest.raises(InputError, match=r"Norms and .*Rival both measure 'norm/mean'.*--trainer.callbacks\+=.*Rival"):
        quantities_of([Norms(), Rival()])
    Module = type("Module", (), {"quantities": Norms.quantities})
    with pytest.raises(InputError, match=r"Module and .*Norms both measure 'norm/mean'"):
        quantities_of([Norms()], Module())


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "options",
    [{}, {"n_heads": 2, "n_attended": 5}, {"template": "zero"}, {"rope": True, "d_head": 4, "context_length": 5}],
    ids=str,
)
def test_everything_that_a_built_in_metric_measures_is_declared_with_its_dimensions(name, options):
    sizes = {"n_features": 11, "d_model": 7, "n_instances": 2, "template": "linear", "n_pairs": 3}
    model = ToyAttentionModel(**{**sizes, **options})
    if model.options.n_attended:
        data = ToyData(n_features=11, n_instances=2, feature_probability=0.4)
        model._attended = data.attended(model.pairs, model.options.n_attended)
    probe = Probe.stack([model.probe().snapshot() for _ in range(3)])
    metric = METRICS[name]()
    declared = {quantity.name: quantity for quantity in metric.quantities}
    with torch.no_grad():
        found = metric.measure(probe)
    assert set(found) <= set(declared)
    sizes = dict(zip(probe.batch_dims, probe.heads.W_Q.shape if probe.heads else probe.features.shape, strict=False))
    for quantity, value in found.items():
        own = declared[quantity].dims
        batch = probe.batch_dims[: value.ndim - len(own)]
        assert value.shape[: len(batch)] == tuple(sizes[d] for d in batch), quantity
        assert batch[:1] == ("step",), quantity


def test_callbacks_that_look_at_one_probe_share_its_decomposition(monkeypatch):
    calls = []
    decompose = AttentionHeads.svd
    monkeypatch.setattr(AttentionHeads, "svd", lambda heads: (calls.append(heads), decompose(heads))[1])
    probe = Probe.stack([ToyAttentionModel(n_features=14, d_model=7).probe().snapshot()])
    SVDAlignment().measure(probe)
    PairSharing().measure(probe)
    assert len(calls) == 1
    assert torch.equal(probe.snapshot().svd.S, probe.svd.S)
    assert len(calls) == 2  # a copy has tensors, and a decomposition, of its own


# ---- the driver


def test_a_trainer_without_a_driver_gets_one_that_measures_before_a_checkpoint_is_written(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
    trainer = make_trainer(tmp_path, 1, [SVDAlignment(), checkpoint], enable_checkpointing=True)
    driver = Driver.of(trainer)
    assert isinstance(driver, Capture)
    assert driver.chunk == 128
    assert trainer.callbacks.index(driver) < trainer.callbacks.index(checkpoint)
    assert Driver.of(trainer) is driver
    own = Capture(chunk=3)
    assert Driver.of(make_trainer(tmp_path, 1, [SVDAlignment(), own])) is own


# ---- sinks


class Sink(RowSink):
    """Writes down what it is told, in a list that several share."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def consume(self, rows):
        self.events.append((self.name, rows.steps.tolist()))

    def finish(self, trainer, pl_module, status):
        self.events.append((self.name, status))


class Fails(pl.Callback):
    """Raises an error before the update of a step."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at:
            raise self.error


def test_sinks_get_the_same_rows_in_order_and_one_end_each(tmp_path):
    events = []
    train(tmp_path, steps=5, callbacks=[Sink("a", events), Capture(chunk=4), Sink("b", events), FeatureOrthogonality()])
    assert events == [
        ("a", [0, 1, 2, 3]), ("b", [0, 1, 2, 3]), ("a", [4, 5]), ("b", [4, 5]), ("a", "finished"), ("b", "finished"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), "failed"), (KeyboardInterrupt(), "interrupted")], ids=str
)
def test_a_run_that_ends_early_keeps_its_whole_rows_and_says_how_it_ended(tmp_path, error, status):
    events = []
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        train(tmp_path, steps=9, callbacks=[Fails(6, error), Sink("a", events), Capture(chunk=4)])
    assert events == [("a", [0, 1, 2, 3]), ("a", [4, 5]), ("a", status)]


def test_what_fails_after_the_end_does_not_end_the_run_a_second_time(tmp_path):
    class FailsLate(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            raise RuntimeError("too late")

    events = []
    with pytest.raises(RuntimeError, match="too late"):
        train(tmp_path, steps=3, callbacks=[Capture(), Sink("a", events), FailsLate()])
    assert events == [("a", [0, 1, 2, 3]), ("a", "finished")]


def test_a_run_that_fails_before_its_first_row_has_no_end(tmp_path):
    events = []
    with pytest.raises(RuntimeError, match="at once"):
        train(tmp_path, callbacks=[Fails(0, RuntimeError("at once")), Sink("a", events)])
    assert events == []


class Validated(pl.LightningModule):
    """A module with a probe that is validated while it trains."""

    def __init__(self):
        super().__init__()
        self.W = torch.nn.Parameter(torch.randn(3, 7, 11))

    def probe(self):
        return Probe(self.global_step, features=self.W)

    def training_step(self, batch, batch_idx):
        return self.W.square().sum()

    def validation_step(self, batch, batch_idx):
        return {}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_validation_inside_a_training_adds_no_rows_and_stand_alone_validation_has_one(tmp_path):
    events = []
    callbacks = [Sink("a", events), FeatureOrthogonality()]
    trainer = make_trainer(tmp_path, 4, callbacks, val_check_interval=2)
    module = Validated()
    trainer.fit(module, [0] * 4, [0] * 3)
    assert events == [("a", [0, 1, 2, 3, 4]), ("a", "finished")]
    events.clear()
    make_trainer(tmp_path, 4, [Sink("a", events), FeatureOrthogonality()]).validate(module, [0] * 3, verbose=False)
    assert events == [("a", [0]), ("a", "finished")]
