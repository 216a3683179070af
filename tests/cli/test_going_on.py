"""How a run goes on: in place, in a directory of its own, and what is refused."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import xarray as xr
import yaml
from helpers.command_line import ForkedCommand, run_dir_of
from helpers.training import same_rows

from svf_lightning.run.lineage import Parent
from svf_lightning.trajectory import has_trajectory, open_trajectory

QUICK = ("--data.batch_size=16", "--model.n_instances=2", "--trainer.logger=false", "--report=false")
EVERY_TEN = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=10")
SAVE = (*EVERY_TEN, "--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename=at-{step}")


def fit(forked, *arguments, **options):
    return forked("fit", *QUICK, *arguments, **options)


def begun(forked, *arguments):
    """A run in ``run`` that has written its first rows, and goes on."""
    process = forked.start("fit", *QUICK, "--capture.chunk=16", *arguments, "--run_dir=run")
    while not (forked.folder / "run" / "trajectory.zarr" / ".zmetadata").is_file():
        assert process.poll() is None, process.output("err")
        time.sleep(0.01)
    return process


def halt(process):
    """Stop a process and wait until each of its threads stands still: a signal does not wait for what is under way."""
    process.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{process.pid}/task")
    while not all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads.iterdir()):
        time.sleep(0.001)


def last(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def rows(run_dir):
    return open_trajectory(run_dir).load()


def bytes_of(run_dir):
    """Everything in a run directory, but for the lock."""
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def files_of(run_dir):
    """Names of its files, but for the lock's."""
    return set(bytes_of(run_dir))


def same_training(one, other, equal=xr.Dataset.equals):
    a, b = last(one), last(other)
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in b["state_dict"])
    assert equal(rows(one), rows(other))
    metrics = [json.loads((run_dir / "summary.json").read_text())["metrics"] for run_dir in (one, other)]
    assert metrics[0] == metrics[1]
    return True


def refused(result, message):
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert re.search(message, line), line
    return True


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs that several tests look at: of 30 steps with a checkpoint every ten, and the same of 45 steps."""
    folder = tmp_path_factory.mktemp("made") / "work"
    folder.mkdir()
    forked = ForkedCommand(folder)
    for name, steps in (("run", 30), ("whole", 45)):
        run_dir_of(fit(forked, f"--trainer.max_steps={steps}", f"--run_dir={name}", *SAVE), forked)
    return folder


@pytest.fixture
def run_dir(forked, made):
    """A copy of the run of 30 steps, in the folder of the test."""
    return Path(shutil.copytree(made / "run", forked.folder / "run"))


@pytest.fixture
def whole(made):
    """The run of 45 steps, to look at."""
    return made / "whole"


# ---- the last checkpoint is the state after the last row -------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "arguments"),
    [
        ("max_steps", ["--trainer.max_steps=13"]),
        ("no step at all", ["--trainer.max_steps=0"]),
        ("max_time", ["--trainer.max_time=00:00:00:01"]),
        ("early stopping", [
            "--trainer.limit_train_batches=7", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=loss/total",
            "--trainer.callbacks.stopping_threshold=1e9",
        ]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_last_checkpoint_is_the_state_after_the_last_row(forked, end, arguments):
    run_dir = run_dir_of(fit(forked, *arguments), forked)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    trajectory = rows(run_dir)
    assert last(run_dir)["global_step"] == summary["steps"] == trajectory["step"].values[-1]
    torch.testing.assert_close(
        last(run_dir)["state_dict"]["W"], torch.tensor(trajectory["W"].isel(step=-1).values), rtol=0, atol=0
    )
    expected = {"max_steps": 13, "no step at all": 0, "early stopping": 7}
    assert summary["steps"] == expected.get(end, summary["steps"])


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGUSR1]], ids=str)
def test_a_signal_ends_the_run_after_its_step_and_says_how_to_go_on(forked, signals):
    process, run_dir = begun(forked, "--trainer.max_steps=1000000"), forked.folder / "run"
    for number in signals:
        process.send_signal(number)
    assert process.wait(60) == 130
    assert "to go on: python -m svf_lightning fit --ckpt_path run" in process.output("err")
    assert "Traceback" not in process.output("err")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert last(run_dir)["global_step"] == summary["steps"] == rows(run_dir)["step"].values[-1]
    n = summary["steps"] + 5
    assert fit(forked, "--ckpt_path=run", f"--trainer.max_steps={n}", "--capture.chunk=16").returncode == 0
    whole = run_dir_of(fit(forked, f"--trainer.max_steps={n}", "--run_dir=whole", "--capture.chunk=16"), forked)
    assert same_training(run_dir, whole, same_rows)


def test_a_second_signal_ends_the_run_at_once(forked):
    process = begun(forked, "--trainer.max_steps=1000000")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in process.output("err")
    steps = rows(forked.folder / "run")["step"].values
    assert steps.tolist() == list(range(len(steps)))


# ---- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/checkpoints/last.ckpt", "last"])
def test_a_run_goes_on_from_its_newest_checkpoint(forked, run_dir, whole, given):
    where = ["--run_dir=run"] if given == "last" else []
    assert run_dir_of(fit(forked, "--ckpt_path", given, *where, "--trainer.max_steps=45"), forked) == run_dir
    assert same_training(run_dir, whole)
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {p.name for p in (whole / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--model.lambda_attn=0.1", r"model.lambda_attn was 10.0 and is 0.1 now"),
        ("--model.learning_rate=0.5", r"model.learning_rate was 0.001 and is 0.5 now"),
        ("--model.optimizer=adamw", r"model.optimizer was 'adam' and is 'adamw' now"),
        ("--seed_everything=1", r"seed_everything was 0 and is 1 now"),
        ("--data.batch_size=32", r"data.batch_size was 16 and is 32 now"),
        ("--capture.every_n_steps=2", r"capture.every_n_steps was 1 and is 2 now"),
        ("--trainer.precision=64-true", r"trainer.precision was None and is '64-true' now"),
        ("--trainer.gradient_clip_val=1", r"trainer.gradient_clip_val was None and is 1 now"),
        (
            "--trainer.callbacks+=svf_lightning.callbacks.TheoryGap",
            r"trainer.callbacks.TheoryGap was None and is 'there'",
        ),
    ],
)
def test_a_changed_setting_is_refused_in_place_and_nothing_is_touched(typed, forked, run_dir, changed, named):
    before = bytes_of(run_dir)
    result = typed("fit", "--ckpt_path=run", "--trainer.max_steps=45", changed)
    assert refused(result, rf"run has other settings: .*{named}.*--run_dir")
    assert bytes_of(run_dir) == before


def test_a_removed_callback_is_refused_before_anything_is_written(typed, forked, run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [c for c in callbacks if not c["class_path"].endswith("SVDAlignment")]
    (forked.folder / "other.yaml").write_text(yaml.safe_dump(config))
    before = bytes_of(run_dir)
    result = typed(
        "fit", "--config=other.yaml", "--ckpt_path=run/checkpoints/at-step=20.ckpt", "--trainer.max_steps=45"
    )
    assert refused(result, r"trainer.callbacks.SVDAlignment was 'there' and is None now")
    assert bytes_of(run_dir) == before


@pytest.mark.parametrize(
    "free",
    [
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=true",
        "--experiment.shows=else",
        "--trainer.callbacks+=LearningRateMonitor",
    ],
)
def test_length_logging_and_display_may_change_in_place(free):
    from svf_lightning.cli import FitSettings
    from svf_lightning.run.lineage import differences

    settings = FitSettings()
    before, now = (yaml.safe_load(settings.of(given)) for given in ([], [free, "--trainer.max_steps=7"]))
    assert differences(before, now) == {}


def test_settings_that_earlier_versions_did_not_have_are_no_difference_at_their_defaults():
    from svf_lightning.run.lineage import differences

    def settings(data, options):
        callback = {"class_path": "svf_lightning.callbacks.TheoryGap", "init_args": {"covariance": "exact", **options}}
        return {"data": {"batch_size": 16, **data}, "trainer": {"callbacks": [callback]}}

    before = settings({}, {})
    later = {"frequency_decay": 0.0, "feature_correlation": 0.0}
    assert differences(before, settings(later, {"n_random": 16, "seed": 0})) == {}
    changed = differences(before, settings({**later, "feature_correlation": 0.2}, {"n_random": 3, "seed": 0}))
    assert changed == {"data.feature_correlation": (None, 0.2), "trainer.callbacks.TheoryGap.n_random": (None, 3)}


def test_a_schedule_makes_the_length_matter():
    from svf_lightning.cli import FitSettings
    from svf_lightning.run.lineage import differences

    settings = FitSettings()
    given = ["--model.lr_schedule=cosine"]
    before, now = (yaml.safe_load(settings.of([*given, f"--trainer.max_steps={n}"])) for n in (10, 20))
    assert differences(before, now) == {"trainer.max_steps": (10, 20)}


def test_going_back_in_a_finished_run_needs_to_be_said(typed, forked, run_dir, whole):
    before = bytes_of(run_dir)
    back = ("--ckpt_path", "run/checkpoints/at-step=10.ckpt", "--trainer.max_steps=45")
    assert refused(typed("fit", *back), r"run has finished, and going back to step 10 would undo .*--overwrite=true")
    assert bytes_of(run_dir) == before
    assert fit(forked, *back, "--overwrite=true").returncode == 0
    assert same_training(run_dir, whole)


def test_a_finished_run_has_nothing_left_to_do(typed, run_dir):
    assert refused(typed("fit", "--ckpt_path=run"), r"max_steps=30 is not usable. Allowed: more than 30, where run has")


def test_a_run_that_was_killed_before_its_summary_is_ended_by_the_same_command(forked, run_dir):
    (run_dir / "summary.json").unlink()
    before = rows(run_dir)
    assert fit(forked, "--ckpt_path=run").returncode == 0
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert rows(run_dir).equals(before)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(forked):
    run_dir = run_dir_of(fit(forked, "--trainer.max_steps=8", "--run_dir=run"), forked)
    whole = rows(run_dir)
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    (run_dir / "summary.json").unlink()
    (run_dir / "trajectory.zarr" / ".zmetadata").unlink()  # in the middle of the first flush
    assert fit(forked, "--ckpt_path=run").returncode == 0
    assert rows(run_dir).equals(whole)


def test_the_command_of_a_run_may_be_repeated_to_go_on(forked, run_dir, whole):
    assert fit(forked, "--trainer.max_steps=45", *SAVE, "--ckpt_path=run").returncode == 0
    assert same_training(run_dir, whole)


def test_missing_rows_are_refused_and_nothing_is_touched(typed, run_dir):
    from helpers.training import keep_rows

    keep_rows(run_dir, 12)
    before = bytes_of(run_dir)
    assert refused(
        typed("fit", "--ckpt_path=run", "--trainer.max_steps=45"), r"18 rows are missing, the first of step 12"
    )
    (run_dir / "trajectory.zarr" / ".zmetadata").unlink()
    assert refused(typed("fit", "--ckpt_path=run", "--trainer.max_steps=45"), r"\.zmetadata is missing")
    del before["trajectory.zarr/.zmetadata"]
    assert bytes_of(run_dir) == before


def test_a_damaged_newest_checkpoint_is_passed_over(forked, run_dir, whole):
    (run_dir / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    (run_dir / "summary.json").unlink()
    assert fit(forked, "--ckpt_path=run", "--trainer.max_steps=45").returncode == 0
    assert same_training(run_dir, whole)


def test_two_runs_do_not_write_into_one_directory(forked, typed):
    process = begun(forked, "--trainer.max_steps=1000000")
    process.send_signal(signal.SIGSTOP)  # at once: it comes to its first checkpoint otherwise
    assert refused(typed("fit", "--run_dir=run"), r"run already holds a run")
    again = typed("fit", "--ckpt_path=run", "--capture.chunk=16")
    assert refused(again, rf"run is being written by another process \(process {process.pid} on ")
    process.kill()
    assert (
        fit(forked, "--ckpt_path=run", "--trainer.max_steps=40", "--capture.chunk=16").returncode == 0
    )  # no stale lock


@pytest.mark.parametrize(("taken", "message"), [
    (".", "was removed while the run wrote it"),
    ("trajectory.zarr", "was removed while the run wrote it"),
])  # fmt: skip
def test_a_run_whose_directory_is_removed_ends_with_one_line_and_makes_no_new_one(forked, taken, message):
    process = begun(forked, "--trainer.max_steps=1000000")
    halt(process)  # or a file that is just being written would stay
    run_dir = forked.folder / "run"
    shutil.rmtree(run_dir / taken)
    left = files_of(run_dir)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 1
    assert re.fullmatch(f".*({message}).*\n", process.output("err")), process.output("err")
    # a part of the store that was just being written may come again: nothing that looks like a run
    assert all(name.startswith("trajectory.zarr/") for name in files_of(run_dir) - left)
    assert not has_trajectory(run_dir)


def test_a_run_in_whose_place_another_one_was_begun_does_not_write_into_it(forked):
    first = begun(forked, "--trainer.max_steps=1000000", "--capture.chunk=2000")
    time.sleep(0.3)  # its rows are written: it trains on to the next chunk
    halt(first)
    run_dir = forked.folder / "run"
    shutil.rmtree(run_dir)
    assert fit(forked, "--run_dir=run", "--trainer.max_steps=20", "--seed_everything=5").returncode == 0
    there = bytes_of(run_dir)
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 1
    assert re.fullmatch(r".*another process has written into run/trajectory\.zarr.*\n", first.output("err"))
    assert bytes_of(run_dir) == there


def test_a_run_whose_experiment_has_a_name_that_no_folder_can_have_goes_on_in_place(forked, run_dir, whole):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["experiment"]["name"] = "a/b"  # as earlier versions allowed
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert fit(forked, "--config=run/config.yaml", "--ckpt_path=run", "--trainer.max_steps=45").returncode == 0
    assert same_training(run_dir, whole)


# ---- in a directory of its own ---------------------------------------------------------------------------------------


def test_changed_settings_make_a_run_of_its_own_that_names_its_parent(forked, run_dir):
    before = bytes_of(run_dir)
    result = fit(
        forked, "--ckpt_path=run/checkpoints/at-step=20.ckpt", "--run_dir=branch", "--trainer.max_steps=35",
        "--model.lambda_attn=0.1", "--model.learning_rate=0.02",
    )  # fmt: skip
    branch = run_dir_of(result, forked)
    assert bytes_of(run_dir) == before
    assert Parent.read(branch) == Parent(
        "run",
        "at-step=20.ckpt",
        20,
        {"model.lambda_attn": (10.0, 0.1), "model.learning_rate": (0.001, 0.02)},
        rows_from=20,
    )
    trajectory = rows(branch)
    assert trajectory["step"].values.tolist() == list(range(20, 36))
    assert set(trajectory["lambda_attn"].values.tolist()) == {0.1}
    assert torch.equal(torch.tensor(trajectory["W"].values[0]), torch.tensor(rows(run_dir)["W"].sel(step=20).values))
    (group,) = last(branch)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.02
    # and the branch itself goes on in place
    assert fit(forked, "--ckpt_path=branch", "--trainer.max_steps=40").returncode == 0
    assert rows(branch)["step"].values.tolist() == list(range(20, 41))


def test_a_branch_with_the_same_settings_keeps_the_rows_and_is_the_same_run(forked, run_dir):
    result = fit(forked, "--ckpt_path=run/checkpoints/at-step=20.ckpt", "--run_dir=branch", "--trainer.max_steps=30")
    assert same_training(run_dir_of(result, forked), run_dir)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_branch_follows_its_own_schedule(forked, schedule):
    arguments = [f"--model.lr_schedule={schedule}", "--trainer.max_steps=30"]
    run_dir_of(fit(forked, *arguments, "--run_dir=run", *SAVE), forked)
    longer = ["--run_dir=branch", "--ckpt_path=run/checkpoints/at-step=20.ckpt", "--trainer.max_steps=40"]
    branch = run_dir_of(fit(forked, *longer), forked)
    (group,) = last(branch)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(0, abs=1e-12)  # at its own end, step 40
    assert Parent.read(branch).differences == {"trainer.max_steps": (30, 40)}
    assert not torch.equal(
        torch.tensor(rows(branch)["W"].values[1]), torch.tensor(rows(forked.folder / "run")["W"].values[21])
    )


def test_an_old_checkpoint_loads_with_a_metric_more_and_with_one_less(forked, run_dir, whole):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    (other,) = [c for c in callbacks if c["class_path"].endswith("SVDAlignment")]
    config["trainer"]["callbacks"] = [c for c in callbacks if c is not other] + [
        {"class_path": "svf_lightning.callbacks.TheoryGap"}
    ]
    (forked.folder / "other.yaml").write_text(yaml.safe_dump(config))
    old = ("--config=other.yaml", "--ckpt_path=run/checkpoints/at-step=20.ckpt")
    branch = run_dir_of(fit(forked, *old, "--run_dir=branch", "--trainer.max_steps=45"), forked)
    differing = {name.split(".")[2] for name in Parent.read(branch).differences}
    assert differing == {"SVDAlignment", "TheoryGap"}
    trajectory, expected = rows(branch), rows(whole)
    assert "alignment/matched" not in trajectory
    assert set(trajectory) - set(expected)
    assert all(torch.equal(last(branch)["state_dict"][n], last(whole)["state_dict"][n]) for n in ("W", "W_Q", "W_K"))
    for name in set(trajectory) & set(expected):
        assert trajectory[name].equals(expected[name].sel(step=trajectory["step"])), name
    tested = run_dir_of(forked("test", *old, "--trainer.logger=false"), forked)
    assert "alignment/matched" not in rows(tested)


def test_a_checkpoint_of_another_shape_is_refused_with_the_differences(typed, run_dir):
    for where in ([], ["--run_dir=branch"]):
        result = typed("fit", "--ckpt_path=run/checkpoints/last.ckpt", "--config=multi_pair", *where)
        assert refused(result, r"of a model of another shape: .*model.d_model was 10 and is 50 now")


def test_weights_alone_can_be_tested_but_not_trained_on(typed, forked):
    arguments = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_weights_only=true")
    more = ("--trainer.callbacks.every_n_train_steps=5", "--trainer.callbacks.filename=w")
    run_dir_of(fit(forked, "--trainer.max_steps=5", "--run_dir=run", *arguments, *more), forked)
    weights = "run/checkpoints/w.ckpt"
    assert refused(typed("fit", "--ckpt_path", weights, "--trainer.max_steps=9"), r"holds weights alone")
    tested = run_dir_of(forked("test", "--ckpt_path", weights, "--trainer.logger=false"), forked)
    assert Parent.read(tested) == Parent("run", "w.ckpt", 5)


@pytest.mark.parametrize(("given", "message"), [
    ("last", r"does not say of which run"), ("best", r"does not say of which run"), (".", r"a directory without a run"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_named_gets_one_line(typed, given, message):
    assert refused(typed("fit", "--ckpt_path", given), message)
