"""`publish`: the W&B run that a run directory makes is the one that the run itself would have made, and only one."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from filelock import FileLock
from helpers.training import keep_rows
from helpers.wandb_runs import Logged, live_run, offline_runs, published, table_of

from svf_lightning import cli
from svf_lightning.__main__ import main
from svf_lightning.commands.publish import publish
from svf_lightning.figures import draw_all
from svf_lightning.rows import Rows
from svf_lightning.sweep.cohort import train
from svf_lightning.sweep.results import INDEX
from svf_lightning.sweep.trial import Trial
from svf_lightning.trajectory import TrajectoryStore, open_trajectory
from svf_lightning.wandb_logger import STEP_METRIC, RunLogger

STEPS = 23
QUICK = [f"--trainer.max_steps={STEPS}", "--data.batch_size=16", "--model.n_instances=9", "--capture.chunk=7"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run with its offline W&B run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run-a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        assert main(["fit", *QUICK, f"--run_dir={run_dir}"]) == 0
    live_run(run_dir)  # it is whole before anyone copies it
    return run_dir


@pytest.fixture
def run_dir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / finished.name, symlinks=True)
    return tmp_path / finished.name


def change_config(run_dir, change):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    change(config)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_published_run_is_the_live_run_and_has_the_claims(finished, run_dir, capsys):
    live = live_run(finished)
    shutil.rmtree(run_dir / "wandb")
    assert main(["publish", str(run_dir)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(run_dir)]
    assert "wandb sync" in err
    found = published(run_dir)
    assert found.about == live.about
    assert found.about[:2] == ("run-a", "svf-lightning")
    assert found.config == live.config
    assert found.config["trainer.max_steps"] == STEPS
    assert found.steps == [0, 5, 10, 15, 20, STEPS, STEPS, STEPS]
    assert len(found.history[0]) > 50
    assert found.history == live.history  # names, values to the last bit, order
    assert found.exit_code == live.exit_code == 0
    claims = json.loads((run_dir / "summary.json").read_text())["claims"]
    table = table_of(run_dir, "claims")
    for name in ("claim", "figure", "verdict", "measured", "needed", "holds", "threshold", "rule", "n", "why"):
        assert [row[name] for row in table] == [claim[name] for claim in claims]
    nulls = [(row["null"], row["null_value"]) for row in table]
    assert nulls == [tuple((claim["null"] or {"name": None, "value": None}).values()) for claim in claims]
    ends = [[row["low"], row["high"]] for row in table]
    assert ends == [claim["interval"] or [None, None] for claim in claims]
    assert len({name for row in live.history for name in row}) <= 100
    assert found.summary.keys() == live.summary.keys()
    for name, value in live.summary.items():
        if not name.startswith(("_", "figures/", "tables/")):  # where W&B keeps files is random
            assert found.summary[name] == value


def test_figures_and_tables_of_the_last_step_are_in_the_run(finished):
    last = {name: json.loads(value) for name, value in live_run(finished).history[-1].items()}
    rows = open_trajectory(finished)
    figures = draw_all(rows, among=lambda figure: figure.logged)
    assert "training" in figures
    assert {name for name in last if name.startswith("figures/")} == {f"figures/{name}" for name in figures}
    for name, figure in figures.items():
        (file,) = (offline_runs(finished)[0] / "files" / "media" / "plotly" / "figures").glob(f"{name}_[0-9]*.json")
        assert hashlib.sha256(file.read_bytes()).hexdigest() == last[f"figures/{name}"]
        assert len(json.loads(file.read_text())["data"]) == len(figure.data)
    final = rows.isel(step=-1)
    pairs = table_of(finished, "pairs")
    assert len(pairs) == rows.sizes["instance"] * rows.sizes["pair"]
    instances = table_of(finished, "instances")
    assert [row["seed"] for row in instances] == rows["seed"].values.tolist()
    for row in pairs:
        assert row["pair/left"] == pytest.approx(float(final["pair/left"][row["instance"], row["pair"]]))
    for row in instances:
        assert row["alignment/matched"] == pytest.approx(float(final["alignment/matched"][row["instance"]]))


def test_the_trajectory_is_an_artifact_for_those_who_ask(run_dir):
    publish(str(run_dir), media=False, trajectory=True)
    (folder,) = offline_runs(run_dir)
    found = Logged(folder)
    assert found.steps[-1] == STEPS
    assert not any(name.startswith(("figures/", "tables/")) for row in found.history for name in row)
    (artifact,) = found.artifacts
    assert (artifact.name, artifact.type) == (f"trajectory-{run_dir.name}", "trajectory")
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"config.yaml", "summary.json", "trajectory.zarr/.zattrs"} <= names


def test_a_second_time_replaces_the_run_and_touches_nothing_else(run_dir):
    others = [f"offline-run-20260101_000000-not-{run_dir.name}", f"run-20260101_000000-{run_dir.name}"]
    for name in others:
        (run_dir / "wandb" / name).mkdir()
    before = {path for path in run_dir.rglob("*") if "wandb" not in path.parts}
    for _ in range(2):  # quickly: W&B names directories by the second
        (old,) = [path for path in offline_runs(run_dir) if path.name not in others]
        assert publish(str(run_dir)) == run_dir
        (new,) = [path for path in offline_runs(run_dir) if path.name not in others]
        assert new != old
    assert Logged(new).steps[-1] == STEPS
    assert all((run_dir / "wandb" / name).is_dir() for name in others)
    assert {path for path in run_dir.rglob("*") if "wandb" not in path.parts} == before


def test_a_run_that_was_killed(finished, run_dir):
    live = live_run(finished)
    (run_dir / "summary.json").unlink()
    keep_rows(run_dir, 18)
    publish(str(run_dir))
    found = published(run_dir)
    assert found.steps == [0, 5, 10, 15, 17, 17]
    assert found.history[:4] == live.history[:4]
    assert {"dynamics/t_align/share", "dynamics/t_ortho/share"} <= found.history[4].keys()
    assert "tables/claims" not in found.summary
    assert {"tables/pairs", "figures/training"} <= found.history[-1].keys()
    assert found.exit_code == 1  # W&B shows it as failed


@pytest.mark.parametrize("logger", [False, None, []])
def test_a_run_that_was_logged_to_nothing(finished, run_dir, logger):
    live = live_run(finished)
    shutil.rmtree(run_dir / "wandb")
    change_config(run_dir, lambda config: config["trainer"].update(logger=logger))
    publish(str(run_dir))
    found = published(run_dir)
    assert found.about == live.about
    assert found.history == live.history


def test_settings_of_the_runs_logger_hold_and_options_come_before_them(run_dir):
    own = {"project": "mine", "entity": "us", "name": "a name", "group": "a group", "tags": ["x"], "job_type": "look"}

    def change(config):
        logger = config["trainer"]["logger"]
        logger["init_args"] = {**own, "mode": "disabled"}
        config["trainer"]["logger"] = [{"class_path": "lightning.pytorch.loggers.CSVLogger"}, logger]

    change_config(run_dir, change)
    publish(str(run_dir))
    assert published(run_dir).about == ("run-a", "mine", "us", "a name", "a group", "look", ["x"])
    publish(str(run_dir), project="other", entity="them")
    assert published(run_dir).about[:3] == ("run-a", "other", "them")


def test_a_trial_of_a_sweep_joins_its_sweep(tmp_path):
    config = cli.FitSettings().of(["--config=robust_seed", *QUICK])
    trial = Trial({"seed_everything": 0}, ("seed_everything",), ("fit",), sweep="some sweep", config=config)
    trial = replace(trial, run_dir=tmp_path / "trials" / trial.id)
    train([trial])
    index = {"name": "some sweep", "metric": None, "trials": [trial.as_json()]}
    (tmp_path / INDEX).write_text(json.dumps(index))
    live = live_run(trial.run_dir)
    publish(str(trial.run_dir))
    found = published(trial.run_dir)
    assert found.about == live.about
    assert found.about[3:6] == ("seed=0", "some sweep", "sweep")
    assert found.config == live.config
    assert found.history[:-3] == live.history[:-1]
    assert {**found.history[-3], **found.history[-2]} == live.history[-1]  # a trial logs both at once
    assert {"figures/training", "tables/claims"} <= found.history[-1].keys()  # and does not draw


def test_a_replay_of_several_devices(tmp_path):
    run_dir = tmp_path / "a replay"
    generator = np.random.default_rng(0)
    values = generator.random((5, 2, 3)).astype(np.float32)
    values[2, 0, 1] = np.nan  # a head that the metric says nothing about
    accuracy = np.linspace(0, 1, 5)
    for rank in range(2):
        rows = np.arange(rank, 5, 2)
        measured = {
            "sad/sparseness": (("layer", "head"), values[rows]),
            "sad/accuracy": ((), accuracy[rows]),
            "prompt/logit": (("prompt",), generator.random((len(rows), 4))),
            "revision": ((), np.array(["main"] * len(rows), dtype="<U64")),
        }
        TrajectoryStore(run_dir, rank=rank).append(Rows(rows * 100, measured, ("layer", "head")))
    (run_dir / "identity.json").write_text("{}")
    trainer = {"logger": None, "log_every_n_steps": None, "max_steps": -1}
    (run_dir / "config.yaml").write_text(
        yaml.safe_dump({"experiment": {"name": "ours", "tags": []}, "trainer": trainer})
    )
    publish(str(run_dir))
    found = published(run_dir)
    assert found.about == ("a replay", "svf-lightning", "", "a replay", "ours", "replay", [])
    assert found.steps == [0, 100, 200, 300, 400, 400]
    heads = table_of(run_dir, "heads")
    assert [(row["layer"], row["head"]) for row in heads] == [(i, j) for i in range(2) for j in range(3)]
    np.testing.assert_allclose([row["sad/sparseness"] for row in heads], values[-1].ravel())
    for k, row in enumerate(found.history[:-1]):
        expected = {
            "sad/sparseness": np.nanmean(values[k]),
            "sad/sparseness/min": np.nanmin(values[k]),
            "sad/sparseness/max": np.nanmax(values[k]),
            "sad/accuracy": accuracy[k],
            STEP_METRIC: 100 * k,
        }
        assert {name: float(value) for name, value in row.items()} == pytest.approx(expected)


class Cloud:
    """W&B online, as far as `publish` looks at it: one run, maybe, and what is sent to it."""

    def __init__(self, monkeypatch, history=None, broken=None):
        import wandb

        self.sent, self.config, self.summary, self.init = [], {}, {}, None
        self.history, self.broken, self.asked = history, broken, None
        monkeypatch.setattr(wandb, "Api", lambda: self)
        monkeypatch.setattr(wandb, "init", self.begin)

    def run(self, path):
        self.asked = path
        if self.broken:
            raise self.broken
        if self.history is None:
            raise ValueError("Could not find run <Run (not found)>")
        return self

    def scan_history(self, keys, use_cache):
        assert not use_cache  # it would not know of what was sent since
        return [row for row in self.history if set(keys) <= row.keys()]

    def begin(self, **settings):
        self.init = settings
        return SimpleNamespace(
            url="https://wandb.example/run", dir=".", offline=False, config=self.config, summary=self.summary,
            define_metric=lambda *args, **kwargs: None, log=self.sent.append, finish=lambda exit_code: None,
        )  # fmt: skip


class Config(dict):
    def update(self, values, allow_val_change):
        assert allow_val_change
        super().update(values)


def online(monkeypatch, run_dir, **cloud):
    found = Cloud(monkeypatch, **cloud)
    found.config = Config()
    publish(str(run_dir), mode="online", entity="us")
    return found


def test_online_only_what_is_missing_is_sent(finished, run_dir, monkeypatch, capsys):
    live = [{name: json.loads(value) for name, value in row.items()} for row in published(finished).history]
    new = online(monkeypatch, run_dir)
    assert new.asked == "us/svf-lightning/run-a"
    assert (new.init["id"], new.init["resume"], new.init["mode"]) == ("run-a", "allow", "online")
    assert "https://wandb.example/run" in capsys.readouterr().err
    assert all(type(value) is float for name, value in new.sent[0].items() if name != STEP_METRIC)
    np.testing.assert_equal(new.sent[:-1], live[:-1])
    assert new.sent[-1].keys() == live[-1].keys()
    assert new.config["trainer.max_steps"] == STEPS
    assert len(new.sent[-1]["tables/claims"].data) == 13
    # the connection broke after a few rows, and in between
    part = online(monkeypatch, run_dir, history=[live[0], live[1], live[3]])
    np.testing.assert_equal(part.sent[:-1], [live[2], *live[4:-1]])
    # everything but the rows at the end
    end = online(monkeypatch, run_dir, history=live[:-2])
    np.testing.assert_equal(end.sent[:-1], live[-2:-1])
    assert end.sent[-1].keys() == live[-1].keys()
    again = online(monkeypatch, run_dir, history=live)
    assert again.sent == []
    assert again.config == new.config
    assert [path.name for path in offline_runs(run_dir)] == [path.name for path in offline_runs(finished)]


def test_without_an_answer_from_wandb_nothing_is_sent(run_dir, monkeypatch, capsys):
    cloud = Cloud(monkeypatch, broken=ConnectionError("no route to host"))
    assert main(["publish", str(run_dir), "--mode=online"]) == 2
    assert cloud.init is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "no route to host" in line
    assert "--mode=offline" in line


def test_a_failure_half_way_leaves_the_earlier_run(run_dir, monkeypatch, capsys):
    earlier = offline_runs(run_dir)
    log = RunLogger._log

    def break_down(self, metrics, step):
        if step == 10:
            raise RuntimeError("the disk is full")
        log(self, metrics, step)

    monkeypatch.setattr(RunLogger, "_log", break_down)
    assert main(["publish", str(run_dir)]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert offline_runs(run_dir) == earlier


def test_a_run_that_is_being_logged_is_left_alone(run_dir, capsys):
    (earlier,) = offline_runs(run_dir)
    with FileLock(run_dir / "wandb" / ".lock"):
        assert main(["publish", str(run_dir)]) == 2
    assert "a run that has ended" in capsys.readouterr().err
    assert offline_runs(run_dir) == [earlier]


def everything(folder):
    return sorted(map(str, Path(folder).rglob("*")))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nothing", "config.yaml"),
        ("no trajectory", "not a trajectory"),
        ("no settings", "not a mapping"),
        ("broken settings", "cannot be read"),
        ("switched off", "WANDB_MODE"),
        ("an agent's trial", "WANDB_SWEEP_ID"),
    ],
)
def test_what_cannot_be_published_is_said_in_one_line(run_dir, monkeypatch, capsys, name, what):
    if name == "nothing":
        run_dir = run_dir.with_name("nothing")
    elif name == "no trajectory":
        shutil.rmtree(run_dir / "trajectory.zarr")
    elif name.endswith("settings"):
        (run_dir / "config.yaml").write_text("" if name == "no settings" else "a: [")
    elif name == "switched off":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    before = everything(run_dir.parent)
    assert main(["publish", str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert what in err
    assert "Fix: " in err
    assert everything(run_dir.parent) == before


def test_the_command_needs_a_directory_and_is_in_the_help(capsys):
    assert main(["publish"]) == 2
    assert "run_dir" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "  publish " in capsys.readouterr().out
    assert main(["publish", "--help"]) == 0
    assert "--mode" in capsys.readouterr().out
