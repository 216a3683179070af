"""What a run is called in W&B, and what all rows of one curve share."""

import json
from pathlib import Path

import pytest
import yaml

from svf_lightning.callbacks import AttentionSparsity, Capture, CausalAblation, ProbeMetric, RunSummary, SVDAlignment
from svf_lightning.errors import InputError
from svf_lightning.run.identity import check_same_identity, metric_identity, wandb_name
from svf_lightning.run.settings import Experiment

EXPERIMENT = Experiment("single_pair", tags=["fig2", "toy"])

# ---- names


def test_a_run_is_called_as_its_directory_in_the_group_of_its_experiment(tmp_path, monkeypatch):
    expected = {
        "run_id": "20260101-120000-ab12", "name": "20260101-120000-ab12", "group": "single_pair", "job_type": "fit",
        "tags": ["fig2", "toy"],
    }  # fmt: skip
    run_dir = tmp_path / "runs" / "single_pair" / "20260101-120000-ab12"
    assert wandb_name(run_dir, "fit", EXPERIMENT) == expected
    assert wandb_name(run_dir, "replay", EXPERIMENT)["job_type"] == "replay"
    run_dir.mkdir(parents=True)
    monkeypatch.chdir(run_dir)
    assert wandb_name(Path(), "fit", EXPERIMENT) == expected  # however the directory is named


def test_a_trial_is_called_by_its_values_in_the_group_of_its_sweep(tmp_path):
    run_dir = tmp_path / "trials" / "lambda_attn=3_seed=0-12345678"
    assert wandb_name(run_dir, "fit", EXPERIMENT, sweep="lambda", label="lambda_attn=3 seed=0") == {
        "run_id": "lambda_attn=3_seed=0-12345678", "name": "lambda_attn=3 seed=0", "group": "lambda",
        "job_type": "sweep", "tags": ["fig2", "toy", "sweep"],
    }  # fmt: skip
    assert wandb_name(run_dir, "fit", EXPERIMENT, sweep="lambda")["name"] == "lambda_attn=3_seed=0-12345678"
    assert EXPERIMENT.tags == ["fig2", "toy"]  # they are left as they were


# ---- the same measurement


def identity(*metrics, **changes):
    """As a replay makes it."""
    return {
        "source.kind": "folder", "source.name": "tiny", "processing": "folded", "dtype": "float32", "features": None,
        "prompts": [["When Mary and John", 3, 1]], "measurement": 1, "metrics": metric_identity(metrics), **changes,
    }  # fmt: skip


def write(folder, content):
    path = folder / "identity.json"
    path.write_text(json.dumps(content))
    return path


def test_the_metrics_of_a_run_are_known_by_version_and_options():
    class Later(SVDAlignment):
        version = 3

    found = metric_identity([Capture(), Later(significant=0.1), RunSummary(), AttentionSparsity(n_draws=2)])
    assert set(found) == {"Later", "AttentionSparsity"}  # what does not measure does not matter
    assert found["Later"] == {"version": 3, "relative_gap": 0.1, "significant": 0.1, "keep_vectors": True}
    assert found["AttentionSparsity"]["n_draws"] == 2


def test_options_that_are_no_json_values_tell_metrics_apart_too(tmp_path):
    class Own(ProbeMetric):
        def __init__(self, folder, steps):
            self.folder, self.steps = folder, steps

        def measure(self, probe):
            return {}

    path = write(tmp_path, identity(Own(Path("a"), (1, 2))))
    check_same_identity(path, identity(Own(Path("a"), (1, 2))))
    with pytest.raises(InputError, match=r"Own\.folder='a', and this call has 'b'"):
        check_same_identity(path, identity(Own(Path("b"), (1, 2))))
    with pytest.raises(InputError, match=r"Own\.steps=\[1, 2\], and this call has \[1\]"):
        check_same_identity(path, identity(Own(Path("a"), (1,))))


def test_a_new_run_and_one_that_measures_the_same_go_on(tmp_path):
    now = identity(SVDAlignment(), CausalAblation())
    check_same_identity(tmp_path / "identity.json", now)
    check_same_identity(write(tmp_path, now), identity(SVDAlignment(), CausalAblation()))
    check_same_identity(write(tmp_path, now), identity(CausalAblation(), SVDAlignment()))  # in any order


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (identity(SVDAlignment(significant=0.1)), r"SVDAlignment\.significant=0\.05, and this call has 0\.1"),
        (identity(SVDAlignment(), CausalAblation()), r"CausalAblation\..*=None, and this call has"),
        (identity(), r"SVDAlignment\..*, and this call has None"),
        (identity(SVDAlignment(), processing="raw"), "processing='folded', and this call has 'raw'"),
        (identity(SVDAlignment(), measurement=2), "measurement=1, and this call has 2"),
        (identity(SVDAlignment(), features=["the"]), r"features=None, and this call has \['the'\]"),
    ],
    ids=["an option", "a metric more", "a metric less", "a setting", "another measurement", "features"],
)
def test_whatever_else_differs_is_refused_by_its_name_with_both_values(tmp_path, now, message):
    path = write(tmp_path, identity(SVDAlignment()))
    before = path.read_text()
    with pytest.raises(InputError, match=rf"measured with {message}.*Fix: use another --run_dir"):
        check_same_identity(path, now)
    assert path.read_text() == before


def test_another_version_of_a_metric_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, identity(SVDAlignment()))
    monkeypatch.setattr(SVDAlignment, "version", 2)
    with pytest.raises(InputError, match=r"SVDAlignment\.version=1, and this call has 2"):
        check_same_identity(path, identity(SVDAlignment()))


# ---- runs of version 0.1.0


def old_run(folder, *metrics, **changes):
    """A directory as version 0.1.0 left it: with the package's version, and options in config.yaml alone."""
    now = identity(*metrics, **changes)
    kept = {name: value for name, value in now.items() if name not in ("measurement", "metrics")}
    callbacks = [{"class_path": "svf_lightning.callbacks.CheckpointTable"}]
    callbacks += [
        {
            "class_path": f"svf_lightning.callbacks.{name}",
            "init_args": {k: v for k, v in given.items() if k != "version"},
        }
        for name, given in json.loads(json.dumps(now["metrics"])).items()
    ]
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "trainer": {"callbacks": callbacks}}))
    return write(folder, kept | {"version": "0.1.0"})


def test_a_run_of_version_0_1_0_goes_on_with_equal_options(tmp_path):
    path = old_run(tmp_path, SVDAlignment(significant=0.1), CausalAblation())
    check_same_identity(path, identity(SVDAlignment(significant=0.1), CausalAblation()))


def test_a_run_of_version_0_1_0_goes_on_where_fewer_numbers_are_removed_than_are_reported_by_default(tmp_path):
    """Its config.yaml holds the argument as it was given: report=[1, 2, 4, 8] with n_removed=4."""
    path = old_run(tmp_path, CausalAblation(n_removed=4))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["trainer"]["callbacks"][-1]["init_args"]["report"] = [1, 2, 4, 8]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    check_same_identity(path, identity(CausalAblation(n_removed=4)))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (identity(SVDAlignment(significant=0.2)), r"SVDAlignment\.significant=0\.1, and this call has 0\.2"),
        (identity(SVDAlignment(significant=0.1), CausalAblation()), "CausalAblation"),
        (identity(SVDAlignment(significant=0.1), dtype="bfloat16"), "dtype='float32', and this call has 'bfloat16'"),
        (identity(SVDAlignment(significant=0.1), measurement=2), "measurement=1, and this call has 2"),
    ],
    ids=["an option", "a metric more", "a setting", "another measurement"],
)
def test_a_run_of_version_0_1_0_does_not_go_on_with_others(tmp_path, now, message):
    with pytest.raises(InputError, match=f"measured with {message}"):
        check_same_identity(old_run(tmp_path, SVDAlignment(significant=0.1)), now)


def test_a_run_of_version_0_1_0_without_its_settings_goes_on_as_nobody_knows_its_options(tmp_path):
    path = old_run(tmp_path, SVDAlignment(significant=0.1))
    (tmp_path / "config.yaml").unlink()
    check_same_identity(path, identity(SVDAlignment()))


def test_the_name_of_a_run_directory_is_wandb_s_id_where_it_can_be(tmp_path):
    def run_id(name):
        return wandb_name(tmp_path / name, "fit", EXPERIMENT)["run_id"]

    assert run_id("20261121-043300-323f") == "20261121-043300-323f"
    assert run_id("lambda_attn=3_seed=0-12345678") == "lambda_attn=3_seed=0-12345678"
    assert run_id("a/../b") == "b"
    unusual = ["a:b", "a-b", "a;b", "n" * 200, "n" * 201, "äöü", ":::"]
    ids = [run_id(name) for name in unusual]
    assert ids[1] == "a-b"
    assert len(set(ids)) == len(ids)
    assert all(len(one) < 128 and not set(one) & set(":;,#?/'") for one in ids)
