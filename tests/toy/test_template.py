import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.toy import make_template


def test_single_has_one_target_logit_from_feature_0_to_feature_1():
    T = make_template("single", n_features=5, n_instances=2, target_logit=[3.0, 7.0]).matrix()
    expected = torch.zeros(2, 5, 5)
    expected[:, 0, 1] = torch.tensor([3.0, 7.0])
    torch.testing.assert_close(T, expected)


def test_linear_falls_from_a_to_a_over_P():
    T = make_template("linear", n_features=9, n_pairs=4, target_logit=8.0).matrix()[0]
    assert [T[i, i + 4].item() for i in range(4)] == [8.0, 6.0, 4.0, 2.0]
    assert T.count_nonzero() == 4


def test_many_to_one_shares_one_key_feature():
    T = make_template("many_to_one", n_features=6, n_pairs=3, target_logit=2.0).matrix()[0]
    assert T[:, 3].tolist() == [2.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    assert T.count_nonzero() == 3


def test_zero_has_no_pair():
    template = make_template("zero", n_features=4, n_instances=2)
    assert template.pairs.shape == (0, 2)
    assert template.matrix().count_nonzero() == 0


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_an_explicit_list_is_taken_as_it_is(data):
    cells = data.draw(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
    logits = {cell: data.draw(st.floats(-9, 9, width=32)) for cell in cells}
    T = make_template(
        [(i, j, a) for (i, j), a in logits.items()], n_features=7, n_instances=3, target_logit=None
    ).matrix()
    for i in range(7):
        for j in range(7):
            assert T[:, i, j].tolist() == [logits.get((i, j), 0.0)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "single", "n_features": 1}, "feature 1, which does not exist.*n_features=1"),
        ({"template": "linear", "n_features": 9, "n_pairs": 5}, "feature 9, which does not exist.*n_pairs"),
        ({"template": [(0, -1, 1.0)], "n_features": 9, "target_logit": None}, "feature -1"),
        ({"template": [(0, 1, 1.0), (0, 1, 2.0)], "n_features": 9, "target_logit": None}, "twice"),
        ({"template": [(0, 1, 1.0)], "n_features": 9}, "target_logit=null"),
        ({"template": [], "n_features": 9, "target_logit": None}, "at least one"),
        ({"template": "diagonal", "n_features": 9}, "template='diagonal'.*single, linear"),
        ({"template": "single", "n_features": 9, "target_logit": [1.0, 2.0]}, "2 values for 1 instances"),
        ({"template": "single", "n_features": 9, "target_logit": float("nan")}, "target_logit=nan"),
        ({"template": "single", "n_features": 9, "target_logit": None}, "target_logit=None"),
        ({"template": "linear", "n_features": 9, "n_pairs": 0}, "n_pairs=0.*>= 1"),
    ],
)
def test_a_template_that_cannot_be_is_refused_with_the_fix(arguments, message):
    with pytest.raises(InputError, match=message):
        make_template(**arguments)
