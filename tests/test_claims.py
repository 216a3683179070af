import json

import numpy as np
import pytest

from svf_lightning.errors import InputError
from svf_lightning.files import write_json
from svf_lightning.run.claims import Claim, judge
from svf_lightning.run.directory import check_free, new_run_dir

METRICS = {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([2.0, 2.0, 7.0]), "c": np.array([1.0, np.nan, 9.0])}


def claim(**options):
    return Claim(**{"claim": "x", "figure": "Fig. 1", "metric": "a", "relation": ">=", "threshold": 1.5, **options})


@pytest.mark.parametrize(
    ("options", "measured", "holds"),
    [
        ({"over": "mean"}, 3.0, True),
        ({"over": "min"}, 1.0, False),
        ({"over": "max", "relation": "<", "threshold": 6.0}, 6.0, False),
        ({"over": "max", "relation": "<=", "threshold": 6.0}, 6.0, True),
        ({"over": "min", "relation": ">", "threshold": 1.0}, 1.0, False),
        ({"relation": "<", "other": "b", "threshold": 0.6}, 2 / 3, True),
        ({"relation": "<", "other": "b", "threshold": 1.0}, 2 / 3, False),
        ({"relation": "<=", "other": "b", "threshold": 1.0}, 1.0, True),
        ({"relation": "<=", "other": "c", "threshold": 1.0}, 2 / 3, False),  # NaN satisfies nothing
        ({"metric": "missing"}, None, False),
        ({"other": "missing"}, None, False),
        ({"metric": "c", "relation": "<", "threshold": 99.0}, None, False),
    ],
)
def test_a_claim_is_computed_from_the_metrics_alone(options, measured, holds):
    verdict = judge(claim(**options), METRICS)
    assert verdict.holds is holds
    assert verdict.measured == (None if measured is None else pytest.approx(measured))


@pytest.mark.parametrize("options", [{"relation": "="}, {"over": "median"}])
def test_a_claim_that_nobody_can_compute_is_refused(options):
    with pytest.raises(InputError):
        claim(**options)


def test_json_is_valid_whatever_the_numbers_are(tmp_path):
    value = {"a": [np.float32(1.5), float("nan"), -np.inf, np.int64(3)], "b": {"c": np.array([1.0, np.inf])}, "d": None}
    write_json(tmp_path / "x.json", value)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {"a": [1.5, None, None, 3], "b": {"c": [1.0, None]}, "d": None}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_two_runs_in_one_second_get_two_names(tmp_path):
    assert len({new_run_dir("x", tmp_path) for _ in range(20)}) == 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "trajectory.zarr"])
def test_a_directory_that_holds_a_run_is_not_free(tmp_path, name):
    check_free(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="already holds a run"):
        check_free(tmp_path)


def test_an_open_question_is_measured_and_not_judged():
    verdict = judge(Claim(claim="how much?", figure="", metric="m", over="max"), {"m": np.array([1.0, 3.0])})
    assert verdict.measured == 3
    assert verdict.holds is None
    assert verdict.threshold is None


def test_a_claim_may_be_about_some_instances_only():
    metrics = {"x": np.array([1.0, 2.0, 3.0, 4.0]), "m": np.array([9.0, 5.0, 7.0, 0.0])}
    claim = Claim(claim="", figure="", metric="m", over="mean", relation=">=", threshold=6, among="x >= 2 and x < 4")
    assert judge(claim, metrics).measured == 6
    assert judge(claim, metrics).holds
    assert "with x >= 2 and x < 4" in judge(claim, metrics).rule


@pytest.mark.parametrize(
    "options",
    [
        {"relation": ">="},
        {"threshold": 1.0},
        {"other": "x"},
        {"relation": ">=", "threshold": 1.0, "among": "x is large"},
        {"relation": ">=", "threshold": 1.0, "among": "x > many"},
    ],
)
def test_a_claim_that_cannot_be_read_is_an_input_error(options):
    with pytest.raises(InputError):
        Claim(claim="", figure="", metric="m", **options)


def test_a_claim_about_instances_that_the_run_has_not_is_open():
    claim = Claim(claim="", figure="", metric="m", relation=">=", threshold=0, among="x > 5")
    verdict = judge(claim, {"m": np.array([1.0, 2.0]), "x": np.array([1.0, 2.0])})
    assert (verdict.measured, verdict.holds) == (None, None)
    assert judge(claim, {"m": np.array([1.0, 2.0])}).holds is False  # x was not measured at all
