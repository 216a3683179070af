"""Claims: what a run shows, contradicts, or cannot tell. Expected values are worked out by hand."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svf_lightning.callbacks import SVDAlignment
from svf_lightning.errors import InputError
from svf_lightning.files import write_json
from svf_lightning.metrics import mean_interval, share_interval
from svf_lightning.metrics.dynamics import Sizes, alignment_by_chance
from svf_lightning.run.claims import Claim, Evidence, crossing, in_words, judge, reading
from svf_lightning.run.directory import check_free, new_run_dir

METRICS = {"a": np.array([1.0, 2.0, 6.0]), "b": np.array([2.0, 2.0, 7.0]), "c": np.array([1.0, np.nan, 9.0])}


def claim(**options):
    return Claim(**{"claim": "x", "figure": "Fig. 1", "metric": "a", "relation": ">=", **options})


def judged(options, last, first=None, **evidence):
    return judge(claim(**options), Evidence(last, first or {}, **evidence))


def spread(mean, n=8, width=0.1):
    """n values of this mean, whose interval is about as wide as width."""
    return mean + width * np.linspace(-0.5, 0.5, n)


@pytest.mark.parametrize(("options", "measured", "verdict"), [
    ({"over": "min", "threshold": 1.5}, 1.0, "no"),
    ({"over": "max", "relation": "<", "threshold": 6.0}, 6.0, "no"),
    ({"over": "max", "relation": "<=", "threshold": 6.0}, 6.0, "yes"),
    ({"over": "min", "relation": ">", "threshold": 1.0}, 1.0, "no"),
    ({"over": "max", "threshold": 5.0}, 6.0, "yes"),  # one instance decides
    ({"relation": "<", "other": "b", "threshold": 0.6}, 2 / 3, "yes"),
    ({"relation": "<", "other": "b", "threshold": 1.0}, 2 / 3, "no"),
    ({"relation": "<", "other": "b"}, 2 / 3, "no"),  # in every instance
    ({"relation": "<=", "other": "b", "share": 1.0}, 1.0, "yes"),
    ({"relation": "<=", "other": "c", "threshold": 1.0}, 2 / 3, "no"),  # NaN satisfies nothing
    ({"metric": "c", "relation": "<", "threshold": 99.0}, None, "no"),
    ({"metric": "missing", "threshold": 0.0}, None, "vacuous"),
    ({"other": "missing"}, None, "no"),
])  # fmt: skip
def test_a_claim_is_computed_from_the_metrics_alone(options, measured, verdict):
    found = judged(options, METRICS)
    assert (found.verdict, found.measured) == (verdict, None if measured is None else pytest.approx(measured))
    assert found.holds is {"yes": True, "no": False}.get(verdict)


@pytest.mark.parametrize(("align", "ortho", "verdict"), [
    ([np.nan] * 8, [np.nan] * 8, "vacuous"),  # neither has happened: as after no step, or one
    ([np.nan] * 8, [np.nan] * 7 + [5.0], "no"),  # one instance has an order
    ([3.0] * 8, [np.nan] * 8, "no"),
    ([3.0] * 8, [5.0] * 8, "yes"),
])  # fmt: skip
def test_the_order_of_two_events_of_which_none_has_happened_is_not_judged(align, ortho, verdict):
    last = {"dynamics/t_align": np.array(align), "dynamics/t_ortho": np.array(ortho)}
    options = {"metric": "dynamics/t_align", "relation": "<", "other": "dynamics/t_ortho", "share": 1.0, "against": 0.5}
    assert judged(options, last).verdict == verdict


@pytest.mark.parametrize(("mean", "verdict"), [(2.0, "yes"), (1.0, "open"), (0.0, "no")])
def test_a_mean_must_pass_the_threshold_with_its_whole_interval(mean, verdict):
    found = judged({"threshold": 1.0}, {"a": spread(mean)})
    assert found.verdict == verdict
    assert found.interval == pytest.approx(mean_interval(spread(mean)))
    assert (found.n, found.null, found.effect) == (8, None, None)


def test_of_one_instance_a_mean_stays_open():
    found = judged({"threshold": 0.0}, {"a": np.array([5.0])})
    assert (found.verdict, found.interval, found.measured) == ("open", None, 5.0)


@pytest.mark.parametrize(("relation", "null", "verdict"), [
    ("<", 0.5, "yes"), ("<", -0.5, "no"), ("<", 0.01, "open"), (">", -0.5, "yes"), (">", 0.5, "no"),
])  # fmt: skip
def test_without_a_threshold_a_claim_is_a_difference_from_its_null(relation, null, verdict):
    found = judged({"relation": relation, "against": null}, {"a": spread(0.0)})
    assert found.verdict == verdict
    assert found.null.value == null
    assert found.effect.value == pytest.approx(-null)
    assert found.effect.interval == pytest.approx(mean_interval(spread(0.0) - null))


def test_a_null_that_is_a_metric_is_compared_instance_by_instance():
    a = np.arange(8.0)  # far more between the instances than inside one
    found = judged({"relation": "<", "against": "b"}, {"a": a, "b": a + spread(0.2)})
    assert found.verdict == "yes"
    assert found.effect.interval == pytest.approx(mean_interval(-spread(0.2)))
    assert (found.null.name, found.null.value) == ("b", pytest.approx(3.7))


def test_a_difference_may_be_too_small_to_count():
    options = {"relation": "<", "against": "b", "by": 0.05}
    verdicts = []
    for difference in (0.5, 0.05, 0.001, -0.5):
        last = {"a": np.zeros(8), "b": spread(difference, width=0.01)}
        verdicts.append(judged(options, last).verdict)
    assert verdicts == ["yes", "open", "no", "no"]
    small = judged(options, {"a": np.zeros(8), "b": spread(0.001, width=0.0001)})
    assert small.why == "the difference is smaller than 0.05, interval and all"
    assert small.needed == "mean < b by 0.05 or more"


def test_the_start_of_the_run_is_a_null():
    found = judged({"relation": ">", "against": "start"}, {"a": spread(1.0)}, {"a": spread(0.2)})
    assert (found.verdict, found.null.name, found.null.value) == ("yes", "start", pytest.approx(0.2))


def test_a_claim_that_its_null_passes_as_well_is_vacuous():
    options = {"threshold": 0.5, "against": "start"}
    assert judged(options, {"a": spread(1.0)}, {"a": spread(0.0)}).verdict == "yes"
    assert judged(options, {"a": spread(1.0)}, {"a": spread(0.7)}).verdict == "vacuous"
    every = {**options, "share": 1.0}
    assert judged(every, {"a": spread(1.0)}, {"a": spread(0.0)}).verdict == "yes"
    assert judged(every, {"a": spread(1.0)}, {"a": spread(0.7)}).verdict == "vacuous"


def test_a_share_must_be_reached_and_be_told_from_that_of_the_null():
    options = {"threshold": 0.5, "share": 0.75, "against": "start"}
    passed = {"a": np.array([1.0] * 6 + [0.0] * 2)}
    found = judged(options, passed, {"a": np.zeros(8)})
    assert found.verdict == "yes"
    assert (found.share.value, found.share.null, found.share.needed) == (0.75, 0.0, 0.75)
    assert found.share.interval == pytest.approx(share_interval(6, 8))
    assert judged({**options, "share": 1.0}, passed, {"a": np.zeros(8)}).verdict == "no"
    two = judged({**options, "share": 1.0}, {"a": np.ones(2)}, {"a": np.zeros(2)})
    assert (two.verdict, two.why) == ("open", "2 of 2 instances: too few to tell from the null")


def test_an_order_is_told_from_either_order_alike_by_enough_instances():
    options = {"relation": "<", "other": "b", "share": 1.0, "against": 0.5}
    verdicts = [judged(options, {"a": np.zeros(n), "b": np.ones(n)}).verdict for n in (1, 4, 8)]
    assert verdicts == ["open", "open", "yes"]  # Clopper and Pearson: from 0.025, 0.40 and 0.63 on


def test_without_a_share_more_units_than_by_chance_are_asked_for():
    options = {"relation": "<", "other": "b", "against": 0.5}
    lower = {n: {"a": np.arange(40.0), "b": np.where(np.arange(40) < n, 99.0, -1.0)} for n in (10, 22, 34)}
    assert [judged(options, lower[n]).verdict for n in (10, 22, 34)] == ["no", "open", "yes"]
    found = judged(options, lower[34])
    assert (found.measured, found.null.value, found.needed) == (0.85, 0.5, "< b in more instances than 0.5")


def test_a_threshold_may_be_halfway_from_the_null_to_what_theory_says():
    options = {"threshold": "halfway", "goal": 1.0, "against": "start", "share": 1.0}
    found = judged(options, {"a": spread(0.8)}, {"a": spread(0.4)})
    assert (found.threshold, found.verdict) == (pytest.approx(0.7), "yes")
    assert judged(options, {"a": spread(0.6)}, {"a": spread(0.4)}).verdict == "no"


def test_a_threshold_may_be_a_level_that_follows_from_the_sizes_and_its_null_chance():
    quantities = {q.name: q for q in SVDAlignment().quantities}
    options = {"metric": "alignment/matched", "threshold": "aligned", "share": 1.0, "against": "chance"}
    known = {"sizes": Sizes(d_model=10, n_singular=10, n_pairs=1), "quantities": quantities}
    found = judged(options, {"alignment/matched": spread(0.99, width=0.01)}, **known)
    chance = alignment_by_chance(10, 10, 1).matched
    assert found.verdict == "yes"
    assert found.threshold == pytest.approx(max(chance.extreme, (1 + chance.mean) / 2))
    assert (found.null.name, found.null.value) == ("chance", pytest.approx(chance.mean))
    assert judged(options, {"alignment/matched": spread(0.5)}, **known).verdict == "no"
    unknown = judged(options, {"alignment/matched": spread(0.99)}, quantities=quantities)
    assert (unknown.verdict, unknown.threshold) == ("vacuous", None)


@given(st.integers(3, 9), st.integers(0, 99))
def test_random_vectors_never_align(n, seed):
    """The level lies beyond the best of a thousand draws: what passes it is not chance."""
    quantities = {q.name: q for q in SVDAlignment().quantities}
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, n))
    cosine = np.abs(x).max(-1) / np.linalg.norm(x, axis=-1)
    options = {"metric": "alignment/matched", "threshold": "aligned", "share": 1.0, "against": "chance"}
    sizes = Sizes(d_model=n, n_singular=n, n_pairs=1)
    last = {"alignment/matched": cosine}
    assert judged(options, last, sizes=sizes, quantities=quantities).verdict in ("no", "vacuous")


def test_what_stands_for_a_unit_of_several_values_may_be_the_worst_of_them():
    last = {"a": np.array([[1.0, 3.0], [2.0, 2.0]])}
    measured = [
        judged({"relation": None, "within": within}, last).measured for within in ("mean", "min", "max")
    ]  # fmt: skip
    assert measured == [2.0, 1.5, 2.5]


def test_units_count_by_their_weight_and_those_without_do_not():
    heads = {"a": np.array([1.0, 3.0, np.nan]), "w": np.array([3.0, 1.0, 0.0])}
    found = judged({"relation": None, "weights": "w"}, heads, unit="head")
    assert (found.measured, found.n) == (1.5, 2)


def test_a_head_that_a_metric_says_nothing_about_does_not_count_and_an_instance_that_diverged_does():
    last = {"a": np.array([1.0, 2.0, np.nan])}
    assert judged({"relation": None}, last, unit="head").measured == 1.5
    assert judged({"relation": None}, last).measured is None
    assert judged({"threshold": 0.0, "share": 1.0}, last).verdict == "no"


def test_where_a_curve_crosses_a_level():
    x = np.array([10.0, 20, 30, 40])
    assert crossing(x, np.array([1.0, 0.9, 0.7, 0.5]), 0.8) == pytest.approx(25)
    assert crossing(x, np.array([0.5, 0.7, 0.9, 1.0]), 0.8) == pytest.approx(25)
    assert crossing(x[::-1], np.array([0.5, 0.7, 0.9, 1.0]), 0.8) == pytest.approx(25)
    assert crossing(x, np.array([1.0, 0.7, 0.9, 0.5]), 0.65) == pytest.approx(25 + 15 * 0.15 / 0.3)  # one step of 0.8
    assert crossing(x, np.array([1.0, 0.9, 0.7, 0.6]), 0.1) == 40
    assert crossing(x, np.array([0.4, 0.3, 0.2, 0.1]), 0.5) == 10


def test_a_claim_about_a_crossing_has_its_interval():
    rng = np.random.default_rng(0)
    x = np.repeat(np.arange(0.0, 60, 10), 8)
    last = {"x": x, "a": 1 - x / 100 + rng.normal(scale=0.02, size=len(x))}
    options = {"along": "x", "crosses": 0.75}
    found = judged({**options, "relation": ">=", "threshold": 55}, last)
    assert found.verdict == "no"
    assert found.interval[0] < 25 < found.interval[1]
    assert found.measured == pytest.approx(25, abs=2)
    assert judged({**options, "relation": ">=", "threshold": 10}, last).verdict == "yes"
    assert judged({**options, "relation": ">=", "threshold": found.measured}, last).verdict == "open"
    assert judged({**options, "relation": None}, last).verdict == "open"


@pytest.mark.parametrize("options", [
    {"relation": "="},
    {"over": "median"},
    {"relation": ">="},
    {"relation": None, "threshold": 1.0},
    {"relation": None, "other": "x"},
    {"threshold": "large"},
    {"threshold": 2.0, "other": "b"},
    {"threshold": "aligned", "other": "b"},
    {"threshold": "halfway", "against": "start"},
    {"threshold": "halfway", "goal": 1.0},
    {"threshold": 1.0, "goal": 1.0},
    {"threshold": 1.0, "share": 1.5},
    {"against": "start", "share": 1.0},
    {"against": "start", "by": -1.0},
    {"threshold": 1.0, "by": 0.1},
    {"threshold": 1.0, "along": "b"},
    {"threshold": 1.0, "along": "b", "crosses": 1.0, "against": "start"},
    {"threshold": 1.0, "within": "median"},
    {"threshold": 1.0, "of": "first"},
    {"threshold": 1.0, "among": "x is large"},
    {"threshold": 1.0, "among": "x > many"},
])  # fmt: skip
def test_a_claim_that_nobody_can_compute_is_refused(options):
    with pytest.raises(InputError, match="change the claim"):
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
    found = judged({"relation": None, "metric": "m", "over": "max"}, {"m": np.array([1.0, 3.0])})
    assert (found.measured, found.verdict, found.holds, found.threshold) == (3, "open", None, None)


def test_a_claim_may_be_about_some_instances_only():
    metrics = {"x": np.array([1.0, 2.0, 3.0, 4.0]), "m": np.array([9.0, 5.0, 7.0, 0.0])}
    options = {"metric": "m", "threshold": 5, "share": 1.0, "among": "x >= 2 and x < 4"}
    found = judged(options, metrics)
    assert (found.measured, found.n, found.verdict) == (6, 2, "yes")
    assert "with x >= 2 and x < 4" in found.rule


def test_a_claim_about_instances_that_the_run_has_not_is_vacuous():
    options = {"metric": "m", "threshold": 0, "among": "x > 5"}
    known = {"m": np.array([1.0, 2.0]), "x": np.array([1.0, 2.0])}
    for last in (known, {"m": known["m"]}):  # x was not measured at all
        found = judged(options, last)
        assert (found.measured, found.verdict, found.holds) == (None, "vacuous", None)


def test_a_claim_about_a_change_looks_at_the_difference_from_the_start():
    found = judged({"relation": None, "of": "change"}, {"a": spread(1.0)}, {"a": spread(0.25)})
    assert found.measured == pytest.approx(0.75)


def test_the_words_for_a_verdict_have_its_numbers():
    found = judged({"relation": "<", "against": "sad/b"}, {"a": spread(0.0), "sad/b": spread(1.0)})
    told = in_words(json.loads(json.dumps(found.as_dict())))
    assert told.verdict == "yes"
    assert told.measured.startswith("0 [-0.0") or told.measured.startswith("-0 [-0.0") or "e-" in told.measured
    assert told.null == "1 (b)"
    assert told.effect.startswith("-1 [-1")
    assert (told.needed, told.n) == ("mean < sad/b", "8")


def test_a_verdict_of_an_earlier_version_has_words_as_well():
    old = {"claim": "x", "figure": "", "measured": 0.5, "holds": False, "needed": "min >= 1"}
    assert in_words(old)[:6] == ("no", "0.5", "", "", "min >= 1", "")
    assert in_words({**old, "measured": None, "holds": None})[:2] == ("open", "not measured")


@pytest.mark.parametrize(("rule", "needed", "null", "told"), [
    ("a/b >= 0.5 in every instance", ">= 0.5 in every instance", {"name": "chance", "value": 0.2},
     "a/b 0.25 [0.2, 0.3]; by chance 0.2; needed: >= 0.5 in every instance; 8 of 8 instances"),
    ("mean < start: a/b over heads", "mean < start", {"name": "start", "value": 2.0},
     "a/b 0.25 [0.2, 0.3]; at the start 2; needed: mean < start; 8 of 8 instances"),
    ("a/b < a/c in every instance", "< a/c in every instance", {"name": "0.5", "value": 0.5},
     "share of units with a/b < a/c: 0.25 [0.2, 0.3]; null 0.5; needed: in every instance; 8 of 8 instances"),
    ("mean < a/d by 0.01 or more: a/b over heads", "mean < a/d by 0.01 or more", {"name": "a/d", "value": None},
     "a/b 0.25 [0.2, 0.3]; needed: mean < a/d by 0.01 or more; 8 of 8 instances"),
    ("mean of a/b over models", "mean, open question", None, "a/b 0.25 [0.2, 0.3]; 8 of 8 instances"),
])  # fmt: skip
def test_a_reading_has_the_metric_what_it_measured_its_null_and_what_was_needed(rule, needed, null, told):
    claim = {
        "claim": "it does", "figure": "", "measured": 0.25, "interval": [0.2, 0.3], "verdict": "yes", "holds": True,
        "rule": rule, "needed": needed, "null": null, "share": {"value": 0.25, "interval": None}, "n": 8,
        "why": "8 of 8 instances",
    }  # fmt: skip
    assert reading(claim) == told
