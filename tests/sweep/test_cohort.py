"""A trial's result is the same in a cohort as alone, and every trial has a run directory of its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from svf_lightning import cli
from svf_lightning.sweep.cohort import can_merge, group_trials, instance_bytes, merged, signature, train
from svf_lightning.sweep.trial import Trial
from svf_lightning.trajectory import open_trajectory

STEPS = 40
COMMON = [
    "--config=robust_seed",
    "--model.n_instances=1",
    f"--trainer.max_steps={STEPS}",
    "--capture.every_n_steps=4",
    "--data.batch_size=32",
]
# what trials of one cohort may differ in
DIFFERENT = {
    "seed": ["--seed_everything=3"],
    "lambda": ["--model.lambda_attn=2"],
    "probability": ["--data.feature_probability=0.3"],
    "frequencies": ["--data.frequency_decay=0.5"],
    "correlation": ["--data.feature_correlation=0.4"],
    "target logit": ["--model.target_logit=3"],
    "importance": ["--model.importance=0.9"],
    "learning rate": ["--model.learning_rate=0.004"],
    "instances": ["--model.n_instances=2", "--seed_everything=8", "--data.streams=separate"],
    "nothing": [],
}


@pytest.fixture(scope="module")
def fit():
    return cli.FitSettings()


@pytest.fixture
def trial(fit, tmp_path):
    def make(name, *args):
        made = Trial({"name": name}, ("name",), ("fit", *COMMON, *args), "some sweep")
        return replace(made, run_dir=tmp_path / "trials" / made.id, config=fit.of([*COMMON, *args]))

    return make


def alone(trial, folder):
    folder.mkdir(exist_ok=True)
    config = folder / "alone.yaml"
    config.write_text(trial.config)
    cli.fit(["--config", str(config), "--run_dir", str(folder / trial.id)])
    return folder / trial.id


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_trial_is_the_same_in_a_cohort_as_alone(trial, tmp_path, schedule):
    trials = [trial(name, *args, f"--model.lr_schedule={schedule}") for name, args in DIFFERENT.items()]
    (cohort,) = group_trials(trials, memory_bytes=1e9)
    assert len(cohort) == len(DIFFERENT)
    train(cohort)
    for one in trials if schedule == "constant" else trials[:1]:
        run_dir = alone(one, tmp_path / "alone")
        expected, found = open_trajectory(run_dir), open_trajectory(one.folder)
        assert found.sizes == expected.sizes
        for name in ("W", "singular_values", "alignment/matched", "loss/total", "pair/left"):
            np.testing.assert_allclose(found[name].values, expected[name].values, rtol=2e-4, atol=2e-5, err_msg=name)
        assert (found["lambda_attn"] == expected["lambda_attn"]).all()
        whole, own = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, one.folder))
        assert whole.keys() == own.keys()
        assert whole["metrics"].keys() == own["metrics"].keys()
        assert [claim["claim"] for claim in whole["claims"]] == [claim["claim"] for claim in own["claims"]]
        assert (own["status"], own["steps"]) == ("finished", STEPS)


def test_every_trial_has_a_whole_run_directory_and_a_wandb_run_in_the_sweeps_group(trial):
    trials = [trial("one", "--model.lambda_attn=1"), trial("two", "--model.lambda_attn=2")]
    train(trials)
    for one in trials:
        names = {path.name for path in one.folder.iterdir()}
        assert {"config.yaml", "summary.json", "trajectory.zarr", "checkpoints", "wandb"} <= names
        assert (one.folder / "config.yaml").read_text() == one.config
        (run,) = (one.folder / "wandb").glob("offline-run-*")
        assert run.name.endswith(one.id)
        written = b"".join(path.read_bytes() for path in run.glob("*.wandb"))
        assert b"some sweep" in written


@pytest.mark.parametrize("rates", [("0.001", "0.001"), ("0.001", "0.003")], ids=["one rate", "two rates"])
def test_a_trial_goes_on_alone_from_its_checkpoint(trial, tmp_path, rates):
    trials = [
        trial(f"rate {i}", f"--model.learning_rate={rate}", f"--seed_everything={i}") for i, rate in enumerate(rates)
    ]
    train(trials)
    one = trials[1]
    more = str(STEPS + 20)
    cli.fit([f"--ckpt_path={one.folder / 'checkpoints' / 'last.ckpt'}", f"--trainer.max_steps={more}"])
    config = yaml.safe_load(one.config)
    config["trainer"]["max_steps"] = int(more)
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    cli.fit(["--config", str(tmp_path / "whole.yaml"), "--run_dir", str(tmp_path / "whole")])
    expected, found = open_trajectory(tmp_path / "whole"), open_trajectory(one.folder)
    assert (found["step"].values == expected["step"].values).all()
    np.testing.assert_allclose(found["W"].values, expected["W"].values, rtol=2e-4, atol=2e-5)


def test_a_trial_that_diverges_fails_alone(trial):
    trials = [trial("fine"), trial("wild", "--model.learning_rate=1e30")]
    train(trials)
    status = [json.loads((one.folder / "summary.json").read_text())["status"] for one in trials]
    assert status == ["finished", "failed"]


@pytest.mark.parametrize(
    "args",
    [
        ["--model.n_features=21"],
        ["--model.d_head=4"],
        ["--data.context_length=3"],
        ["--data.batch_size=16"],
        ["--trainer.max_steps=41"],
        ["--model.template=linear", "--model.n_pairs=2"],
        ["--model.optimizer=adamw"],
        ["--capture.every_n_steps=3"],
    ],
    ids=lambda args: args[0],
)
def test_trials_of_other_shapes_or_schedules_do_not_train_together(trial, args):
    assert len(group_trials([trial("one"), trial("other", *args)], memory_bytes=1e9)) == 2


def test_a_trial_with_a_callback_of_the_users_trains_alone(trial):
    own = trial("own", "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor")
    assert not can_merge(own.settings())
    assert len(group_trials([trial("one"), own, own], memory_bytes=1e9)) == 2


def test_a_cohort_stays_within_its_memory(trial):
    trials = [trial(str(i), f"--seed_everything={i}") for i in range(12)]
    each = instance_bytes(trials[0].settings())
    cohorts = group_trials(trials, memory_bytes=5 * each)
    assert max(map(len, cohorts)) <= 5
    assert sorted(one.id for cohort in cohorts for one in cohort) == sorted(one.id for one in trials)
    assert len(group_trials(trials, memory_bytes=1.0)) == 12
    assert len(group_trials(trials, memory_bytes=1e12, merge=False)) == 12


def test_the_memory_estimate_is_not_below_what_activations_take(trial):
    settings = trial("one").settings()
    tokens = 32 * 9
    assert instance_bytes(settings) > 4 * 5 * tokens * settings["model"]["n_features"]


def test_trials_that_share_a_seed_share_their_draws(trial):
    trials = [trial(f"{a} {s}", f"--model.lambda_attn={a}", f"--seed_everything={s}") for a in (1, 2) for s in (0, 1)]
    settings = [one.settings() for one in trials]
    whole = merged(settings)
    assert whole["data"]["seed"] == [0, 1, 0, 1]
    assert whole["model"]["lambda_attn"] == [1, 1, 2, 2]
    assert len({signature(one) for one in settings}) == 1


def test_own_learning_rates_are_those_of_adam(tmp_path):
    from svf_lightning.toy.optimizer import InstanceAdam

    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 2, generator=g)
    grads = torch.randn(5, 3, 4, 2, generator=g)
    rates = [1e-3, 1e-2, 3e-2]
    for options in ({}, {"weight_decay": 0.1, "decoupled_weight_decay": True}):
        own = torch.nn.Parameter(start.clone())
        optimizer = InstanceAdam([own], torch.tensor(rates, dtype=torch.float64), **options)
        theirs = [torch.nn.Parameter(start[i].clone()) for i in range(3)]
        others = [torch.optim.Adam([p], lr=rate, **options) for p, rate in zip(theirs, rates, strict=True)]
        for grad in grads:
            own.grad = grad
            optimizer.step()
            for i, (p, other) in enumerate(zip(theirs, others, strict=True)):
                p.grad = grad[i]
                other.step()
        torch.testing.assert_close(own.detach(), torch.stack([p.detach() for p in theirs]), rtol=1e-5, atol=1e-6)


def test_trials_of_an_earlier_version_which_lack_newer_settings_train_together(trial):
    settings = [yaml.safe_load(trial(name, *DIFFERENT[name]).config) for name in ("lambda", "probability")]
    expected = merged(settings)
    later = ("frequency_decay", "feature_correlation")
    for one in settings:
        for name in later:
            one["data"].pop(name)
    assert signature(settings[0]) == signature(settings[1])
    found = merged(settings)
    assert {k: v for k, v in expected["data"].items() if k not in later} == found["data"]
    assert found["model"] == expected["model"]
