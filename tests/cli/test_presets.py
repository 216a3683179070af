"""Every preset runs and judges its claims; what has not trained shows none of them."""

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
    assert all(claim["measured"] is not None for claim in summary["claims"] if claim["n"])
    assert (run_dir / "report.html").stat().st_size < 8e6
    assert "not available" not in result.stderr  # W&B, for whatever reason
    trajectory = open_trajectory(run_dir)
    ((_, logged),) = Rows.read(trajectory.isel(step=[-1]), known(trajectory)).to_log(every=1, last=-1)
    media = list((run_dir / "wandb" / "latest-run" / "files" / "media").rglob("*.json"))
    assert len(media) >= 4
    assert len(logged) + 2 * 4 + len(media) <= 100  # with mean, min, max and share of t_align and t_ortho


# what a run of six steps may show: it is measured against another direction, not against an untrained head
SHOWN_EARLY = {
    "anisotropy": {
        "un-whitening the singular vectors brings them nearer to the features",
        "the first right singular vector is nearer to Theorem 1's Sigma^-1 y than to the feature",
    },
    "correlated_features": {"un-whitening by the covariance of tokens brings them nearer to the features"},
    "rare_features": {"un-whitening by the covariance of tokens brings them nearer to the features"},
    "cone": {"the first right singular vector stays nearer to its feature than to the axis of the cone"},
    "multi_pair": {
        "scores are sparser in the singular basis than in its strongest control",
        "and than before training",
    },
}


@pytest.mark.parametrize("preset", presets())
def test_no_claim_of_a_preset_holds_for_a_model_that_has_not_trained(forked, preset):
    """Every verdict can fail; and each claim stands beside its null."""
    claims = claims_of(forked("fit", "--config", preset, "--trainer.max_steps=6", *PLAIN), forked)
    assert {claim["claim"] for claim in claims if claim["verdict"] == "yes"} <= SHOWN_EARLY.get(preset, set())
    for claim in claims:
        is_crossing = "crosses" in claim["rule"]
        assert claim["null"] is not None or claim["verdict"] == "open" or is_crossing, claim["claim"]
        assert claim["n"] == 0 or claim["interval"] is not None or claim["needed"].startswith(("min", "max"))


def test_without_an_attention_loss_the_claims_about_the_head_fail(forked):
    """lambda = 0: the features train, the head does not."""
    claims = claims_of(forked("fit", "--model.lambda_attn=0", "--trainer.max_steps=400", *PLAIN), forked)
    verdicts = {claim["claim"]: claim["verdict"] for claim in claims}
    assert verdicts["the top singular vectors are the attended features"] == "no"
    assert verdicts["attended features turn orthogonal to the rest"] == "no"
    assert all(verdict != "yes" for claim, verdict in verdicts.items() if "half of the way" in claim)


@pytest.mark.parametrize(("options", "claim"), [
    (["--model.d_head=1"], "the head has rank one"),
    (["--model.d_model=1", "--model.n_features=2"], "the top singular vectors are the attended features"),
])  # fmt: skip
def test_a_claim_that_cannot_fail_at_these_sizes_is_vacuous(forked, options, claim):
    claims = claims_of(forked("fit", *options, "--trainer.max_steps=6", *PLAIN), forked)
    (found,) = (one for one in claims if one["claim"].startswith(claim))
    assert (found["verdict"], found["holds"]) == ("vacuous", None)


REDUCED = {
    "single_pair": ["--model.n_instances=4", "--data.batch_size=128"],
    "no_head": ["--model.n_instances=4", "--data.batch_size=512", "--trainer.max_steps=3000"],
    "orthogonalization": ["--model.n_instances=4", "--data.batch_size=128"],
    "many_to_one": ["--model.n_instances=4", "--data.batch_size=128"],
}
# measured at the full size with other seeds; see docs/results.md for those that do not hold
MUST_HOLD = {
    "single_pair": [
        "the top singular vectors are the attended features",
        "with sign and partner, the head turns the key feature into the query feature",
        "attended features turn orthogonal to the rest",
    ],
    "no_head": ["features settle in antipodal pairs"],
    "orthogonalization": ["under a given head, attended features turn orthogonal to the rest"],
    "many_to_one": ["the first left singular vector is that of the least-squares optimum"],
}


@pytest.mark.parametrize("preset", REDUCED)
def test_what_theory_says_is_shown_already_at_a_reduced_size(forked, preset):
    claims = claims_of(forked("fit", "--config", preset, *REDUCED[preset], *PLAIN), forked)
    verdicts = {claim["claim"]: claim["verdict"] for claim in claims}
    assert {claim: verdicts[claim] for claim in MUST_HOLD[preset]} == dict.fromkeys(MUST_HOLD[preset], "yes")


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_every_preset_finishes_in_full_whatever_its_verdicts(forked, preset):
    result = forked("fit", "--config", preset, *PLAIN)
    summary = json.loads((run_dir_of(result, forked) / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert all(claim["measured"] is not None for claim in summary["claims"] if claim["verdict"] != "vacuous")


@pytest.mark.slow
def test_replay_without_options_trains_a_suite_that_learns_the_task(command):
    result = command("replay", timeout=1800)
    assert (command.folder / "runs" / "suites" / "tiny").is_dir()
    summary = json.loads((run_dir_of(result, command) / "summary.json").read_text())
    assert summary["experiment"] == "tiny_suite"
    assert all(claim["measured"] is not None for claim in summary["claims"])
    assert summary["claims"][0]["verdict"] == "yes"
