"""RunSummary: summary.json and the closing table, however a run ends."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.training import make_trainer, train

from svf_lightning.callbacks import (
    Capture,
    FeatureOrthogonality,
    ProbeMetric,
    Quantity,
    RunSummary,
    SVDAlignment,
    TrajectoryWriter,
)
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import time_of_change
from svf_lightning.probe import Probe
from svf_lightning.run.claims import Claim
from svf_lightning.run.settings import Experiment, Run
from svf_lightning.toy import ToyData
from svf_lightning.trajectory import open_trajectory

CLAIM = Claim(claim="it aligns", figure="Fig. 2a", metric="alignment/matched", relation=">=", threshold=0.0)


def callbacks(*others, **options):
    return [
        Capture(chunk=4),
        SVDAlignment(),
        FeatureOrthogonality(),
        TrajectoryWriter(),
        RunSummary(**options),
        *others,
    ]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)


ORDER = Claim(
    claim="it aligns first", figure="Fig. 3", metric="dynamics/t_align", relation="<", other="dynamics/t_ortho", share=1.0,
    against=0.5,
)  # fmt: skip


@pytest.mark.parametrize(("steps", "verdicts"), [(0, ["vacuous", "vacuous"]), (1, ["yes", "vacuous"])])
def test_a_training_of_no_step_or_of_one_ends_well_and_says_nothing_of_what_has_not_happened(tmp_path, steps, verdicts):
    train(tmp_path, steps=steps, callbacks=callbacks(experiment="short", claims=[CLAIM, ORDER]))
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["steps"]) == ("finished", steps)
    assert open_trajectory(tmp_path)["step"].values.tolist() == list(range(steps + 1))
    assert [claim["verdict"] for claim in summary["claims"]] == verdicts
    assert all(np.isfinite(summary["metrics"]["alignment/matched"]["per_instance"]))
    assert summary["metrics"]["dynamics/t_align"]["per_instance"] == [None] * 3
    assert summary["metrics"]["dynamics/t_align"]["happened"] == 0


def test_the_summary_has_the_last_values_of_every_instance_with_label_and_unit(tmp_path):
    train(tmp_path, steps=9, callbacks=callbacks(experiment="mine"))
    summary = summary_of(tmp_path)
    assert {name: summary[name] for name in ("experiment", "status", "steps", "over")} == {
        "experiment": "mine", "status": "finished", "steps": 9, "over": "instances",
    }  # fmt: skip
    assert summary["seconds"] > 0
    assert {"torch", "lightning", "svf-lightning", "python"} <= set(summary["versions"])
    last = open_trajectory(tmp_path).isel(step=-1)
    for name, unit in (("alignment/matched", "|cosine|"), ("spectrum/sigma_1", "nats"), ("loss/total", "")):
        metric, values = summary["metrics"][name], last[name].values
        assert metric["unit"] == unit
        np.testing.assert_allclose(metric["per_instance"], values)
        assert metric["mean"] == pytest.approx(values.mean())
        assert (metric["min"], metric["max"]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    assert summary["metrics"]["alignment/matched"]["label"] == "alignment of singular vectors"
    assert "W" not in summary["metrics"]


def test_a_quantity_of_a_user_is_summarized_and_shown_like_the_others(tmp_path, capsys):
    class Norms(ProbeMetric):
        quantities = (Quantity("norm/mean", "mean length", unit="furlongs"),)

        def measure(self, probe):
            return {"norm/mean": probe.features.norm(dim=-2).mean(-1), "undeclared": probe.features.norm(dim=(-2, -1))}

    train(tmp_path, callbacks=callbacks(Norms()))
    metrics = summary_of(tmp_path)["metrics"]
    assert (metrics["norm/mean"]["label"], metrics["norm/mean"]["unit"]) == ("mean length", "furlongs")
    assert (metrics["undeclared"]["label"], metrics["undeclared"]["unit"]) == ("undeclared", "")
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "norm/mean" in line)
    assert "mean length" in line
    assert "furlongs" in line
    assert f"{metrics['norm/mean']['mean']:.4g}" in line


class Ramps(ProbeMetric):
    """A quantity that rises to 1 in two of three instances, in the third to 0.5 only."""

    quantities = (Quantity("ramp", better="higher", level=0.9, change=Quantity("dynamics/t_ramp", "it is up")),)

    def measure(self, probe):
        rise = (torch.as_tensor(probe.step).reshape(-1, 1) / torch.tensor([4.0, 6.0, 4.0])).clamp(max=1)
        return {"ramp": rise * torch.tensor([1.0, 1.0, 0.5])}


def test_a_change_is_timed_where_it_happened_and_null_where_it_did_not(tmp_path, capsys):
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step):
            logged.append(dict(metrics))

    train(tmp_path, steps=60, callbacks=callbacks(Ramps()), trainer={"logger": Logger()})
    metric = summary_of(tmp_path)["metrics"]["dynamics/t_ramp"]
    assert metric["per_instance"] == [4, 6, None]
    assert {key: metric[key] for key in ("mean", "min", "max", "happened")} == {
        "mean": 5, "min": 4, "max": 6, "happened": 2,
    }  # fmt: skip
    at_the_end = {name: value for name, value in logged[-1].items() if "t_ramp" in name}
    assert at_the_end == {
        "dynamics/t_ramp": 5, "dynamics/t_ramp/min": 4, "dynamics/t_ramp/max": 6, "dynamics/t_ramp/share": 2 / 3,
    }  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "It is up: in 2 of 3 instances at step 5 (median); mean value from 0 to 0.833, needed >= 0.9." in shown


def test_nothing_is_timed_where_nothing_happened_and_loggers_get_no_number(tmp_path, capsys):
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step):
            logged.append((step, dict(metrics)))

    train(tmp_path, steps=9, callbacks=callbacks(), trainer={"logger": Logger()})
    dataset = open_trajectory(tmp_path)
    for name, source in (
        ("dynamics/t_align", "alignment/matched"),
        ("dynamics/t_ortho", "orthogonality/attended_vs_rest"),
    ):
        moved = time_of_change(torch.tensor(dataset[source].values), torch.tensor(dataset["step"].values))
        assert moved.isfinite().all()  # the curves do move, a little
        metric = summary_of(tmp_path)["metrics"][name]
        assert metric["per_instance"] == [None] * 3
        assert (metric["mean"], metric["happened"], metric["unit"]) == (None, 0, "steps")
        step, at_the_end = logged[-1]
        assert step == 9
        assert {key: value for key, value in at_the_end.items() if key.startswith(name)} == {f"{name}/share": 0}
    assert capsys.readouterr().out.count("did not happen in any of 3 instances") == 2


def test_without_a_trajectory_there_are_last_values_and_no_times_of_change(tmp_path):
    train(tmp_path, steps=5, callbacks=[SVDAlignment(), RunSummary()])
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["steps"]) == ("finished", 5)
    assert "alignment/matched" in summary["metrics"]
    assert not any(name.startswith("dynamics/") for name in summary["metrics"])


class Fails(pl.Callback):
    """Raises an error before the update of step 6."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 6:
            raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), "failed"), (KeyboardInterrupt(), "interrupted")], ids=str
)
def test_a_run_that_ends_early_is_summarized_up_to_its_last_whole_row(tmp_path, error, status):
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        train(tmp_path, steps=9, callbacks=callbacks(Fails(error)))
    summary = summary_of(tmp_path)
    assert (summary["status"], summary["steps"]) == (status, 5)
    last = open_trajectory(tmp_path).isel(step=-1)
    np.testing.assert_allclose(summary["metrics"]["loss/total"]["per_instance"], last["loss/total"].values)


class Heads(pl.LightningModule):
    """Two layers of three heads; nothing is said about the last one."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.Q, self.K = (torch.nn.Parameter(torch.randn(2, 3, 5, 7, generator=g)) for _ in "QK")

    def probe(self):
        Q = self.Q.detach().clone()
        Q[1, 2] = torch.nan
        return Probe(self.global_step, AttentionHeads(Q, self.K), batch_dims=("layer", "head"))

    def training_step(self, batch, batch_idx):
        return self.Q.square().sum() + self.K.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_of_a_module_without_instances_values_are_listed_over_heads_and_those_without_one_do_not_count(
    tmp_path, capsys
):
    module = Heads()
    make_trainer(tmp_path, 3, [SVDAlignment(), TrajectoryWriter(), RunSummary()]).fit(module, [0] * 9)
    summary = summary_of(tmp_path)
    assert summary["over"] == "heads"
    S = torch.linalg.svdvals((module.Q.mT @ module.K).detach())[..., 0].flatten()
    metric = summary["metrics"]["spectrum/sigma_1"]
    assert metric["per_instance"][:5] == pytest.approx(S[:5].tolist(), rel=1e-4)
    assert metric["per_instance"][5] is None
    assert metric["mean"] == pytest.approx(S[:5].mean().item(), rel=1e-4)
    assert "mean, min and max over 6 heads" in capsys.readouterr().out


def test_claims_are_judged_written_and_shown(tmp_path, capsys):
    certain = Claim(
        claim="it aligns", figure="Fig. 2a", metric="alignment/matched", relation=">", threshold=0.0, share=1
    )
    impossible = Claim(claim="it is perfect", figure="Fig. 9", metric="alignment/matched", relation=">=", threshold=2.0)
    question = Claim(claim="how strong?", figure="", metric="spectrum/sigma_1", over="max")
    writer = RunSummary(claims=[certain, impossible, question])
    train(tmp_path, callbacks=[SVDAlignment(), TrajectoryWriter(), writer])
    claims = summary_of(tmp_path)["claims"]
    assert [(claim["claim"], claim["holds"]) for claim in claims] == [
        ("it aligns", True), ("it is perfect", False), ("how strong?", None),
    ]  # fmt: skip
    assert [verdict.as_dict() for verdict in writer.verdicts] == claims
    matched = summary_of(tmp_path)["metrics"]["alignment/matched"]["mean"]
    assert claims[0]["measured"] == pytest.approx(matched)
    shown = capsys.readouterr().out
    for claim, answer in (("it aligns", "yes"), ("it is perfect", "no"), ("how strong?", "open")):
        assert answer in next(line for line in shown.splitlines() if claim in line)


def test_name_and_claims_that_are_not_given_are_those_of_the_run(tmp_path):
    run = Run(tmp_path, "fit", Experiment("of the run", claims=[CLAIM]))
    plain, own = RunSummary(), RunSummary("own", claims=[CLAIM, CLAIM])
    for summary in (plain, own):
        summary.join(run)
    assert (plain.experiment.name, plain.experiment.claims) == ("of the run", [CLAIM])
    assert (own.experiment.name, own.experiment.claims) == ("own", [CLAIM, CLAIM])
    evaluation = RunSummary()
    evaluation.join(Run(tmp_path, "test", Experiment("of the run", claims=[CLAIM])))
    assert evaluation.experiment.claims == []  # an evaluation of a checkpoint has none to judge


def test_an_evaluation_is_summarized_at_the_step_of_its_weights_without_times_of_change(tmp_path):
    model = train(tmp_path / "fit", steps=5)
    data = ToyData(n_features=11, n_instances=3, batch_size=16, context_length=5, held_out_batches=2)
    model._loaded_step = 5  # as from a checkpoint
    make_trainer(tmp_path / "test", 5, callbacks()).test(model, data, verbose=False)
    summary = summary_of(tmp_path / "test")
    assert (summary["status"], summary["steps"]) == ("finished", 5)
    assert not any(name.startswith("dynamics/") for name in summary["metrics"])


def test_the_summary_may_go_elsewhere(tmp_path):
    train(tmp_path / "run", callbacks=[SVDAlignment(), RunSummary(run_dir=str(tmp_path / "there"))])
    assert summary_of(tmp_path / "there")["status"] == "finished"
    assert not (tmp_path / "run" / "summary.json").exists()
