import _thread
import signal
import time

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.training import Weights, make_trainer, train
from lightning.pytorch.demos.boring_classes import BoringModel

from svf_lightning.callbacks import (
    Capture,
    FeatureOrthogonality,
    HeadSharing,
    Measured,
    ProbeMetric,
    RowSink,
    RunSummary,
    StepProgress,
    SVDAlignment,
    TrajectoryWriter,
)
from svf_lightning.errors import DivergedError, InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.probe import Probe
from svf_lightning.quantities import Quantity
from svf_lightning.run.settings import CaptureOptions, Experiment, Run
from svf_lightning.toy import ToyData
from svf_lightning.trajectory import open_trajectory

ALL = (SVDAlignment, FeatureOrthogonality, TrajectoryWriter, StepProgress, RunSummary)


def capture(**options):
    return [Capture(**options), *(callback() for callback in ALL)]


def test_a_row_holds_the_weights_of_its_step_and_their_loss(tmp_path):
    witness = Weights()
    train(tmp_path, steps=21, callbacks=[witness, *capture(chunk=8)])
    dataset = open_trajectory(tmp_path)
    assert dataset["step"].values.tolist() == list(range(22))
    np.testing.assert_array_equal(dataset["W"].values, torch.stack([w["W"] for w in witness.weights]))
    np.testing.assert_array_equal(dataset["loss/total"].values[:-1], torch.stack(witness.losses))
    assert np.isfinite(dataset["loss/total"].values[-1]).all()


def test_capture_on_or_off_the_weights_are_bit_identical(tmp_path):
    plain = train(tmp_path / "off", steps=40).state_dict()
    watched = train(tmp_path / "on", steps=40, callbacks=capture(chunk=8)).state_dict()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_rows_do_not_depend_on_how_they_were_chunked(tmp_path):
    """But for the last bit: batched kernels round differently for other batch sizes, which turns vectors of tiny sigma."""
    found = []
    for chunk in (1, 7, 64):
        train(tmp_path / str(chunk), steps=30, callbacks=capture(chunk=chunk))
        found.append(open_trajectory(tmp_path / str(chunk)).load())
    for other in found[1:]:
        np.testing.assert_array_equal(found[0]["W"].values, other["W"].values)
        for name in found[0].variables:
            if name not in ("U", "V", "cosine_left", "cosine_right"):
                np.testing.assert_allclose(
                    found[0][name].values, other[name].values, rtol=1e-4, atol=1e-5, err_msg=name
                )


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_steps": 7}, [0, 7, 14, 21, 25]),
        ({"log_spaced": 3}, [0, 1, 3, 5, 10, 22, 25]),
    ],
)
def test_a_schedule_captures_its_steps_and_always_the_first_and_the_last(tmp_path, options, steps):
    train(tmp_path, steps=25, callbacks=capture(**options))
    dataset = open_trajectory(tmp_path)
    assert dataset["step"].values.tolist() == steps
    train(tmp_path / "all", steps=25, callbacks=capture())
    everything = open_trajectory(tmp_path / "all").sel(step=steps)
    np.testing.assert_array_equal(dataset["W"].values, everything["W"].values)


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"log_spaced": -1}, {"chunk": 0}])
def test_a_schedule_that_cannot_be_is_refused(options):
    with pytest.raises(InputError):
        Capture(**options)


def test_options_that_are_not_given_are_those_of_the_run(tmp_path):
    run = Run(tmp_path, "fit", Experiment(), CaptureOptions(every_n_steps=5, chunk=3))
    callback = Capture(log_spaced=2)
    callback.join(run)
    assert callback.options == CaptureOptions(every_n_steps=5, log_spaced=2, chunk=3)
    assert callback.chunk == 3
    with pytest.raises(InputError, match=r"capture\.chunk=3 and 8 in the Capture callback contradict"):
        Capture(chunk=8).join(run)


@pytest.mark.parametrize("checkpoint_at", [6, 13, 16])
@pytest.mark.parametrize("options", [{}, {"every_n_steps": 5}])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(tmp_path, checkpoint_at, options):
    def checkpoints(folder):
        return pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    settings = {"model": {"lr_schedule": "cosine", "optimizer": "adamw", "weight_decay": 0.1}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer = {"enable_checkpointing": True}
    a = train(whole, 24, [*capture(chunk=8, **options), checkpoints(whole)], trainer=trainer, **settings)
    train(broken, 24, [*capture(chunk=8, **options), checkpoints(broken)], trainer=trainer, **settings)
    b = train(
        broken,
        24,
        [*capture(chunk=8, **options), checkpoints(broken / "again")],
        trainer=trainer,
        ckpt_path=str(broken / f"step={checkpoint_at}.ckpt"),
        weights_only=True,
        **settings,
    )
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    rows_a, rows_b = open_trajectory(whole).load(), open_trajectory(broken).load()
    for name in rows_a.variables:
        np.testing.assert_array_equal(rows_a[name].values, rows_b[name].values, err_msg=name)


def test_a_resumed_run_cuts_its_chunks_where_the_run_would_have_cut_them(tmp_path):
    class Chunks(RowSink):
        def __init__(self):
            self.steps = []

        def consume(self, rows):
            self.steps.append(rows.steps.tolist())

    saved = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    options, trainer = {"chunk": 4, "every_n_steps": 2}, {"enable_checkpointing": True}
    first, resumed = Chunks(), Chunks()
    train(tmp_path, 14, [Capture(**options), first, saved], trainer=trainer)
    assert first.steps == [[0, 2, 4], [6], [8, 10], [12, 14]]  # cut at checkpoints, too
    train(tmp_path, 16, [Capture(**options), resumed], ckpt_path=str(tmp_path / "step=6.ckpt"), weights_only=True)
    assert resumed.steps == [[6], [8, 10, 12, 14], [16]]


class OtherModule(pl.LightningModule):
    """A module of a user: two layers of heads, float64, other dimension names."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.Q, self.K = (torch.nn.Parameter(torch.randn(2, 3, 5, 7, generator=g, dtype=torch.float64)) for _ in "QK")
        self.features = torch.randn(2, 3, 7, 11, generator=g, dtype=torch.float64)

    def probe(self):
        heads = AttentionHeads(self.Q, self.K, scale=0.5)
        pairs = torch.tensor([[0, 1], [2, 3]])
        return Probe(
            self.global_step, heads, self.features, pairs, torch.ones(2, 3, 2).double(), batch_dims=("layer", "head")
        )

    def training_step(self, batch, batch_idx):
        return self.Q.square().sum() + self.K.square().sum()

    def test_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_module_of_a_user_works_with_every_callback_as_soon_as_it_has_a_probe(tmp_path):
    module = OtherModule()
    make_trainer(tmp_path, 5, [SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter(), RunSummary()]).fit(
        module, [0] * 9
    )
    dataset = open_trajectory(tmp_path)
    assert dataset["alignment/matched"].dims == ("step", "layer", "head")
    assert dataset["step"].values.tolist() == [0, 1, 2, 3, 4, 5]
    S = torch.linalg.svdvals(0.5 * module.Q.mT @ module.K)[..., :5].detach()
    np.testing.assert_allclose(dataset["singular_values"].isel(step=-1), S, rtol=1e-9)


def test_the_metric_callbacks_measure_a_test_run_as_they_measure_training(tmp_path):
    model = train(tmp_path / "fit", steps=10, callbacks=capture())
    data = ToyData(n_features=11, n_instances=3, batch_size=16, context_length=5, held_out_batches=4)
    make_trainer(tmp_path / "test", 10, capture()).test(model, data, verbose=False)
    trained, tested = open_trajectory(tmp_path / "fit").isel(step=-1), open_trajectory(tmp_path / "test")
    assert tested.sizes["step"] == 1
    for name in ("alignment/matched", "orthogonality/rest_vs_rest", "singular_values"):
        np.testing.assert_allclose(tested[name].values[0], trained[name].values, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        expected = torch.stack([model.losses(f)["loss/total"] for f in data.test_dataloader()]).mean(0)
    np.testing.assert_allclose(tested["loss/total"].values[0], expected, rtol=1e-5)


def test_a_module_without_a_probe_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"SVDAlignment looks at the probe.*BoringModel has none"):
        make_trainer(tmp_path, 1, [SVDAlignment()]).fit(BoringModel())


def test_a_metric_of_a_user_is_logged_and_kept_like_the_others(tmp_path):
    class Norms(ProbeMetric):
        def measure(self, probe):
            norms = probe.features.norm(dim=-2)
            return {"norm/mean": norms.mean(-1), "norms": Measured(norms, ("feature",))}

    witness = Weights()
    train(tmp_path, steps=5, callbacks=[witness, Norms(), TrajectoryWriter()])
    dataset = open_trajectory(tmp_path)
    expected = torch.stack([w["W"].norm(dim=-2) for w in witness.weights])
    np.testing.assert_allclose(dataset["norms"], expected, rtol=1e-6)
    np.testing.assert_allclose(dataset["norm/mean"], expected.mean(-1), rtol=1e-6)


def test_a_quantity_that_declares_its_dimensions_is_measured_as_a_plain_tensor(tmp_path):
    class Norms(ProbeMetric):
        quantities = (
            Quantity("norms", "length of the features", unit="length", dims=("feature",)),
            Quantity("norm/shared", "one number for all instances"),
        )

        def measure(self, probe):
            norms = probe.features.norm(dim=-2)
            return {"norms": norms, "norm/shared": norms.mean((-1, -2))}

    witness = Weights()
    train(tmp_path, steps=5, callbacks=[witness, Norms(), TrajectoryWriter()])
    dataset = open_trajectory(tmp_path)
    assert dataset["norms"].dims == ("step", "instance", "feature")
    assert dataset["norms"].attrs["units"] == "length"
    assert dataset["norm/shared"].dims == ("step",)
    expected = torch.stack([w["W"].norm(dim=-2) for w in witness.weights])
    np.testing.assert_allclose(dataset["norms"], expected, rtol=1e-6)


class Undeclared(ProbeMetric):
    """Measures a length for each feature, and declares nothing."""

    def measure(self, probe):
        return {"norms": probe.features.norm(dim=-2)}


class Scalar(Undeclared):
    quantities = (Quantity("norms", dims=("d_model", "feature", "more")),)


@pytest.mark.parametrize("metric", [Undeclared, Scalar])
def test_a_value_whose_dimensions_are_not_those_declared_is_an_error_that_says_what_to_declare(tmp_path, metric):
    with pytest.raises(InputError, match=r"'norms' was measured with 3 dimensions.*Fix: add Quantity\('norms', dims"):
        train(tmp_path, 3, [Capture(), metric(), TrajectoryWriter()])


def test_a_value_that_is_measured_twice_without_being_declared_is_an_error_that_names_the_metric(tmp_path):
    class Twice(ProbeMetric):
        def measure(self, probe):
            return {"spectrum/sigma_1": probe.features.norm(dim=-2).mean(-1)}

    with pytest.raises(
        InputError, match=r"Twice measures 'spectrum/sigma_1', which another .* Fix: rename it in Twice"
    ):
        train(tmp_path, callbacks=[SVDAlignment(), Twice()])


def test_two_metrics_of_one_name_are_an_error(tmp_path):
    with pytest.raises(InputError, match="SVDAlignment is in the run twice, and both measure 'spectrum/"):
        train(tmp_path, callbacks=[SVDAlignment(), SVDAlignment()])


class Recorder(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))


def test_the_logger_gets_one_dictionary_per_step_with_mean_min_and_max(tmp_path):
    logger = Recorder()
    train(tmp_path, steps=10, callbacks=capture(chunk=2), trainer={"logger": logger, "log_every_n_steps": 3})
    steps = [step for step, metrics in logger.rows if "loss/total" in metrics]
    assert steps == [0, 3, 6, 9, 10]
    dataset = open_trajectory(tmp_path)
    for step, metrics in logger.rows[:5]:
        values = dataset["alignment/matched"].sel(step=step).values
        assert metrics["alignment/matched"] == pytest.approx(values.mean())
        assert metrics["alignment/matched/min"] == pytest.approx(values.min())
        assert metrics["alignment/matched/max"] == pytest.approx(values.max())
    assert len({name for _, metrics in logger.rows for name in metrics}) <= 100


def test_metrics_can_be_monitored_by_lightnings_own_callbacks(tmp_path):
    stop = pl.callbacks.EarlyStopping(
        "alignment/matched", mode="max", stopping_threshold=-1.0, check_on_train_epoch_end=True
    )
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.update(trainer.callback_metrics)

    train(tmp_path, steps=12, callbacks=[*capture(chunk=4), stop, Look()])
    assert "alignment/matched" in seen


def test_an_instance_that_diverges_is_named_and_all_of_them_end_the_run(tmp_path, capsys):
    train(tmp_path / "one", steps=8, callbacks=capture(chunk=4), model={"lambda_attn": [1.0, 3e38, 1.0]})
    assert "instance 1 diverged at step 0: loss/total is not finite" in capsys.readouterr().err
    with pytest.raises(DivergedError, match="every instance diverged"):
        train(tmp_path / "all", steps=8, callbacks=capture(chunk=4), model={"lambda_attn": 3e38})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_rows_are_those_of_the_gpus_weights(tmp_path):
    witness = Weights()
    train(tmp_path, steps=9, callbacks=[witness, *capture(chunk=4)], trainer={"accelerator": "gpu", "devices": 1})
    expected = torch.stack([w["W"].cpu() for w in witness.weights])
    np.testing.assert_array_equal(open_trajectory(tmp_path)["W"].values, expected)


class InterruptsWhileWriting(RowSink):
    """Presses Ctrl-C in the middle of the second chunk."""

    def __init__(self):
        self.chunks = 0

    def consume(self, rows):
        self.chunks += 1
        if self.chunks == 2:
            _thread.interrupt_main()
            time.sleep(0.5)  # the main thread leaves the training meanwhile


@pytest.fixture
def _ctrl_c_works():
    """Also where the tests are a background job, whose shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_works")
def test_a_chunk_that_is_being_written_when_ctrl_c_comes_is_whole(tmp_path):
    callbacks = [InterruptsWhileWriting(), *capture(chunk=4)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(tmp_path, steps=100, callbacks=callbacks)
    steps = open_trajectory(tmp_path)["step"].values.tolist()
    driver = next(c for c in callbacks if isinstance(c, Capture))
    assert steps == list(range(len(steps)))
    assert len(steps) >= 8
    assert driver.last.steps[-1] == steps[-1]


VARIANT = {"n_features": 11, "d_model": 7, "d_head": 4, "n_instances": 2, "init_feature_norm": 1.0}


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        ({}, ("instance",)),
        ({"n_heads": 3}, ("instance", "head")),
        ({"rope": True, "context_length": 5}, ("instance", "offset")),
        ({"n_heads": 3, "rope": True, "context_length": 5}, ("instance", "head", "offset")),
    ],
)
def test_every_variant_is_captured_with_its_own_dimensions(tmp_path, options, dims):
    callbacks = [Capture(chunk=4), SVDAlignment(), FeatureOrthogonality(), HeadSharing(), TrajectoryWriter()]
    model = train(tmp_path, steps=6, model={**VARIANT, **options}, callbacks=callbacks)
    dataset = open_trajectory(tmp_path)
    assert dataset["alignment/matched"].dims == ("step", *dims)
    assert dataset["U"].dims == ("step", *dims, "d_model", "rank")
    assert dataset["W"].dims == ("step", "instance", "d_model", "feature")
    assert dataset["orthogonality/interference"].dims == ("step", "instance")
    assert dataset["loss/total"].dims == ("step", "instance")
    probe = model.probe()
    U = probe.heads.svd().U.detach()
    W = model.W.detach().reshape(2, *(1,) * (len(dims) - 1), 7, 11)
    expected = torch.nn.functional.normalize(W, dim=-2).mT @ U
    np.testing.assert_allclose(dataset["cosine_left"].isel(step=-1), expected.abs(), atol=2e-6)
    one = dataset["cosine_left"].isel(step=-1, instance=1).values
    np.testing.assert_allclose(one, expected.abs()[1], atol=2e-6)
