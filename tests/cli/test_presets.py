"""Every preset runs, computes its claims, and at a reduced size they hold; in full, under the mark slow."""

import json

import pytest
from helpers.command_line import run_dir_of

from svf_lightning.cli import presets
from svf_lightning.registry import known
from svf_lightning.rows import Rows
from svf_lightning.trajectory import open_trajectory

PLAIN = ("--report=false", "--trainer.logger=false")


def claims_of(result, command):
    return json.loads((run_dir_of(result, command) / "summary.json").read_text())["claims"]


@pytest.mark.parametrize("preset", presets())
def test_every_preset_runs_and_computes_its_claims(forked, preset):
    result = forked("fit", "--config", f"configs/{preset}.yaml", "--trainer.max_steps=6", "--data.batch_size=8")
    run_dir = run_dir_of(result, forked)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["experiment"] == preset
    assert summary["claims"]
    assert all(claim["measured"] is not None for claim in summary["claims"] if "dynamics" not in claim["rule"])
    assert (run_dir / "report.html").stat().st_size < 8e6
    assert "not available" not in result.stderr  # W&B, for whatever reason
    trajectory = open_trajectory(run_dir)
    ((_, logged),) = Rows.read(trajectory.isel(step=[-1]), known(trajectory)).to_log(every=1, last=-1)
    media = list((run_dir / "wandb" / "latest-run" / "files" / "media").rglob("*.json"))
    assert len(media) >= 4
    assert len(logged) + 2 * 4 + len(media) <= 100  # with mean, min, max and share of t_align and t_ortho


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_every_claim_of_every_preset_holds(forked, preset):
    claims = claims_of(forked("fit", "--config", preset, *PLAIN), forked)
    assert [claim["claim"] for claim in claims if claim["holds"] is False] == []


@pytest.mark.slow
def test_replay_without_options_trains_a_suite_and_every_claim_of_its_preset_holds(command):
    result = command("replay", timeout=1800)
    assert (command.folder / "runs" / "suites" / "tiny").is_dir()
    summary = json.loads((run_dir_of(result, command) / "summary.json").read_text())
    assert summary["experiment"] == "tiny_suite"
    assert all(claim["measured"] is not None for claim in summary["claims"])
    assert [claim["claim"] for claim in summary["claims"] if claim["holds"] is False] == []


REDUCED = {
    "single_pair": ["--model.n_instances=2", "--data.batch_size=128"],
    "no_head": ["--model.n_instances=2", "--data.batch_size=512", "--trainer.max_steps=3000"],
    "anisotropy": [
        "--model.n_features=40", "--model.d_model=20", "--model.n_instances=4",
        "--model.cone_strength=[0.0,0.4,0.8,1.1]", "--trainer.max_steps=800", "--model.init_head_scale=0.1",
    ],
    "orthogonalization": ["--model.n_instances=2", "--data.batch_size=128"],
    "many_to_one": ["--model.n_instances=2", "--data.batch_size=128"],
    "rope": ["--model.n_instances=2", "--data.batch_size=128"],
    "multi_head": ["--model.n_instances=1", "--data.batch_size=128", "--trainer.max_steps=3000"],
    "robust_lambda": ["--model.n_instances=3", "--model.lambda_attn=[0.3,10,300]", "--data.batch_size=128"],
}  # fmt: skip


@pytest.mark.parametrize("preset", REDUCED)
def test_the_claims_of_a_preset_hold_already_at_a_reduced_size(forked, preset):
    """Claims about some of the instances alone are left to the full size."""
    claims = claims_of(forked("fit", "--config", preset, *REDUCED[preset], *PLAIN), forked)
    judged = [claim for claim in claims if claim["holds"] is not None and "instances with" not in claim["rule"]]
    assert judged
    assert {claim["claim"]: claim["measured"] for claim in judged if not claim["holds"]} == {}
