"""Which checkpoints of a training are not what they say they are."""

import json

import numpy as np
import pytest
import torch
from helpers.trainings import SHAPES, STEPS, checkpoints_of, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.replay.model_files import hash_and_fingerprint
from svf_lightning.run.fingerprint import N_SAMPLED, Fingerprint, misplaced


def flagged(trained, **options):
    return misplaced(checkpoints_of(trained, **options))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shake=st.floats(0, 0.5), n=st.integers(1, len(STEPS)))
def test_a_training_that_is_as_it_should_be_has_no_flag(seed, shake, n):
    assert flagged(weights_of(seed, STEPS[:n], shake)) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nor_has_one_in_half_precision_or_one_that_is_only_noise(dtype):
    trained = weights_of(3)
    rounded = {step: {name: t.to(dtype) for name, t in tensors.items()} for step, tensors in trained.items()}
    assert flagged(rounded) == {}
    noise = np.random.default_rng(0)
    still = {k: {n: torch.tensor(1 + 0.1 * noise.normal(size=s)) for n, s in SHAPES.items()} for k in STEPS}
    assert flagged(still) == {}


@pytest.mark.parametrize("at", [1, 8, 64, 384])
def test_weights_of_the_last_step_are_flagged_and_say_so(at):
    trained = weights_of()
    trained[at] = trained[512]
    assert flagged(trained) == {at: "has the weights of step 512, the last one, bit for bit"}
    assert flagged(trained, with_fingerprint=False) == flagged(trained)  # as in runs of version 0.1.0


@pytest.mark.parametrize(("at", "of"), [(128, 2), (2, 128), (384, 16), (8, 256)])
def test_weights_of_another_step_are_flagged_where_they_do_not_belong(at, of):
    trained = weights_of()
    trained[at] = trained[of]
    assert flagged(trained) == {at: f"has the weights of step {of}, bit for bit"}


def test_without_a_fingerprint_nobody_knows_where_they_belong_so_both_are_flagged():
    trained = weights_of()
    trained[128] = trained[2]
    assert list(flagged(trained, with_fingerprint=False)) == [2, 128]


def test_a_training_that_has_not_begun_to_change_its_weights_keeps_its_first_step():
    trained = weights_of()
    trained[1] = trained[2] = trained[0]
    assert list(flagged(trained)) == [1, 2]


@pytest.mark.parametrize("name", ["embed", "in", "out"])
@pytest.mark.parametrize(("at", "of"), [(128, 2), (8, 512), (32, 256)])
def test_one_tensor_of_another_step_is_named(name, at, of):
    trained = weights_of()
    trained[at] = trained[at] | {name: trained[of][name]}
    assert flagged(trained) == {at: f"has {name} of step {of}, bit for bit"}


def test_a_tensor_that_never_changes_or_begins_to_later_is_no_mistake():
    trained = weights_of()
    for step, tensors in trained.items():
        tensors["embed"] = trained[0]["embed"]
        tensors["in"] = trained[8]["in"] if step < 8 else tensors["in"]
    assert flagged(trained) == {}


def test_a_checkpoint_of_another_training_jumps_against_both_neighbours():
    trained, other = weights_of(0), weights_of(1)
    trained[8] = other[8]
    ((step, reason),) = flagged(trained).items()
    assert step == 8
    assert "jumps against both neighbours, " in reason
    trained[4] = other[4]  # two in a row
    assert list(flagged(trained)) == [4, 8]


def test_one_tensor_of_another_training_is_named():
    trained = weights_of()
    trained[8] = trained[8] | {"norm": trained[8]["norm"] + 0.8}
    assert flagged(trained) == {8: "norm jumps against both neighbours"}


def test_weights_of_the_end_of_the_training_are_flagged_though_they_equal_none():
    """Of the 154 branches of Pythia-2.8b, 86 served weights of the end."""
    steps = list(range(0, 154_000, 1000))
    trained = weights_of(0, steps, shake=0.02)
    served = np.random.default_rng(0).permutation(steps[1:100])[:86]
    wrong = {int(step): trained[int(end)] for step, end in zip(served, np.resize(steps[-30:], 86), strict=True)}
    for number, (step, tensors) in enumerate(wrong.items()):
        trained[step] = {name: tensor + 1e-6 * (1 + number) for name, tensor in tensors.items()}
    reasons = flagged(trained)
    assert set(reasons) <= set(wrong)
    assert len(reasons) >= 83  # the others come so late that they are not out of place by much
    assert all("nearer to the last weights" in why or "jumps" in why for why in reasons.values())


def test_a_flag_goes_or_comes_with_more_checkpoints():
    trained = weights_of()
    trained[8] = weights_of(1)[8]
    some = checkpoints_of(trained)
    assert misplaced(some[:5]) == {}  # up to step 8: it has one neighbour
    assert list(misplaced(some)) == [8]
    assert list(misplaced(some[::-1])) == [8]  # in any order


def test_another_model_among_them_disturbs_nothing():
    trained = weights_of()
    trained[16] = {name: tensor[:-1] for name, tensor in trained[16].items()}
    assert flagged(trained) == {}


def test_a_fingerprint_is_json_and_comes_back_as_it_was():
    _, kept = hash_and_fingerprint(torch.nn.ParameterDict(weights_of()[4]))
    again = Fingerprint.from_json(json.loads(json.dumps(kept.as_json())))
    assert again.tensors == kept.tensors
    np.testing.assert_array_equal(again.sample, kept.sample)
    assert again.shapes == {name: "x".join(map(str, shape)) for name, shape in sorted(SHAPES.items())}
    for damaged in ({"tensors": [], "sample": ""}, {"tensors": kept.tensors, "sample": "AAAA"}):
        with pytest.raises(ValueError, match=r"fingerprint|reshape|buffer"):
            Fingerprint.from_json(damaged)


def test_a_tensor_is_sampled_at_the_same_entries_and_a_small_one_as_a_whole():
    values = torch.arange(5000.0)
    one, other = (hash_and_fingerprint(torch.nn.ParameterDict({"a": v, "b": torch.ones(3)})) for v in (values, -values))
    np.testing.assert_array_equal(one[1].sample[0], -other[1].sample[0])
    assert len(set(one[1].sample[0])) == N_SAMPLED
    np.testing.assert_array_equal(one[1].sample[1], [1, 1, 1] + [0] * 13)
    assert one[1].tensors["a"] != other[1].tensors["a"]
    assert one[1].tensors["b"] == other[1].tensors["b"]
