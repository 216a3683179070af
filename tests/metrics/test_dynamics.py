"""When a quantity has changed: hand-made series, and a plain loop as reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import (
    align_pairs,
    attended_vs_rest,
    gram,
    has_happened,
    noise_of,
    signed_cosine_matrix,
    time_of_change,
)
from svf_lightning.metrics.dynamics import LEVELS, Sizes, alignment_by_chance, least_overlap, overlap_by_chance

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SETTINGS = settings(deadline=None, max_examples=60, derandomize=True)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def loop_time_of_change(values, steps, fraction):
    """The definition: the first step after which the share of the way never falls below ``fraction``."""
    if not all(math.isfinite(v) for v in values) or values[0] == values[-1]:
        return math.nan
    share = [(v - values[0]) / (values[-1] - values[0]) for v in values]
    return next(steps[t] for t in range(len(values)) if all(s >= fraction for s in share[t:]))


@DTYPES
def test_rise_is_timed_at_ninety_percent_of_its_way(dtype):
    series = torch.arange(11, dtype=dtype)  # exactly 90 % at the tenth value
    assert time_of_change(series, torch.arange(11) * 100).item() == 900
    assert time_of_change(series, torch.arange(11) * 100, fraction=0.5).item() == 500
    assert time_of_change(series, torch.arange(11) * 100, fraction=1.0).item() == 1000


@DTYPES
def test_fall_is_timed_like_a_rise(dtype):
    series = torch.tensor([0.8, 0.7, 0.5, 0.11, 0.04, 0.0], dtype=dtype)
    steps = torch.tensor([0, 10, 20, 30, 40, 50])
    assert time_of_change(series, steps).item() == 40
    assert time_of_change(series, steps, fraction=0.8).item() == 30
    assert time_of_change(-series, steps).item() == 40


@DTYPES
def test_dip_back_below_the_threshold_gives_the_later_time(dtype):
    series = torch.tensor([0.0, 0.95, 0.99, 0.7, 0.92, 1.2, 1.0], dtype=dtype)
    assert time_of_change(series, torch.arange(7)).item() == 4


@DTYPES
def test_dip_right_before_the_end_gives_the_last_step(dtype):
    series = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5, 1.0], dtype=dtype)
    assert time_of_change(series, torch.arange(6)).item() == 5


def test_overshoot_still_counts_as_reached():
    assert time_of_change(torch.tensor([0.0, 3.0, 2.0, 1.0]), torch.arange(4)).item() == 1


@DTYPES
@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [0.0, 0.0], [0.3, 0.9, 0.3]], ids=str)
def test_series_that_ends_where_it_began_has_no_time(values, dtype):
    assert time_of_change(torch.tensor(values, dtype=dtype), torch.arange(len(values))).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_series_with_a_value_that_is_not_finite_has_no_time(value, position):
    series = torch.linspace(0, 1, 4).repeat(3, 1).mT.clone()
    series[position, 1] = value
    got = time_of_change(series, torch.arange(4))
    assert got[1].isnan()
    assert got[[0, 2]].tolist() == [3, 3]


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(("n_values", "n_steps"), [(3, 4), (4, 3), (0, 0), (0, 2), (2, 0)])
def test_unequal_or_empty_lengths_are_an_input_error(n_values, n_steps):
    with pytest.raises(InputError, match=rf"series={n_values}\b.*\({n_steps}\)"):
        time_of_change(torch.zeros(n_values), torch.arange(n_steps))


def test_time_is_read_off_the_recorded_steps_however_they_are_spaced():
    steps = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 100_003])
    series = torch.tensor([0, 0, 0, 0, 0.1, 0.2, 0.5, 0.89, 0.91, 0.95, 1.0, 1.0])
    got = time_of_change(series, steps)
    assert got.item() == 128
    assert got.is_floating_point()
    series[-2] = 0.5
    assert time_of_change(series, steps).item() == 100_003


def test_large_steps_are_exact():
    steps = torch.tensor([0, 2**24 + 1])  # not a float32
    assert time_of_change(torch.tensor([0.0, 1.0]), steps).item() == 2**24 + 1


@DTYPES
@SETTINGS
@given(
    columns=st.integers(1, 13).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-8, 8) | st.just(math.nan), min_size=n, max_size=n), min_size=1, max_size=5
        )
    ),
    fraction=st.sampled_from([0.25, 0.5, 0.9, 1.0]),
)
def test_batch_of_columns_equals_the_loop_over_one_column(dtype, columns, fraction):
    steps = [0, *(2**t for t in range(len(columns[0]) - 1))]
    series = torch.tensor(columns, dtype=dtype).mT
    got = time_of_change(series, torch.tensor(steps), fraction=fraction)
    expected = torch.tensor([loop_time_of_change(column, steps, fraction) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    alone = [time_of_change(column, torch.tensor(steps), fraction=fraction) for column in series.unbind(-1)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=0, equal_nan=True)


def test_every_leading_batch_shape_works():
    series = torch.rand(11, 2, 3, generator=torch.Generator().manual_seed(0))
    got = time_of_change(series, torch.arange(11))
    assert got.shape == (2, 3)
    assert torch.equal(got.flatten(), time_of_change(series.flatten(1), torch.arange(11)))


@pytest.mark.parametrize("device", DEVICES)
def test_result_stays_on_the_device_of_the_series(device):
    series = torch.linspace(0, 1, 11).repeat(3, 1).mT
    got = time_of_change(series.to(device), torch.arange(11).to(device))
    assert got.device.type == device
    assert torch.equal(got.cpu(), time_of_change(series, torch.arange(11)))


# ---- whether it happened ---------------------------------------------------------------------------------------------


def test_a_change_has_happened_where_it_reaches_its_level_in_its_direction():
    ends = torch.tensor([0.95, 0.5, 0.95, 0.2])
    starts = torch.tensor([0.1, 0.1, 1.0, 0.9])
    share = torch.linspace(0, 3, 40).clamp(max=1)[:, None]
    series = starts + (ends - starts) * share
    assert has_happened(series, level=0.9, rises=True).tolist() == [True, False, False, False]
    assert has_happened(series, level=0.3, rises=False).tolist() == [False, False, False, True]
    assert has_happened(series).tolist() == [True] * 4
    assert has_happened(series, level=math.nan, rises=True).tolist() == [False] * 4
    with pytest.raises(InputError, match=r"level=0\.9"):
        has_happened(series, level=0.9)


@pytest.mark.parametrize("n", [5, 10, 30, 300])
def test_noise_alone_is_seldom_a_change_and_never_one_on_its_own_level(n):
    series = torch.randn(n, 2000, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    share = has_happened(series).double().mean()
    assert share < (0.3 if n < 10 else 0.02 if n < 100 else 0.005)  # few rows say little of the noise
    assert not has_happened(series / 100, level=0.9, rises=True).any()


def test_a_small_change_counts_on_a_quiet_curve_and_not_on_a_noisy_one():
    step = torch.where(torch.arange(100) < 50, 0.0, 1.0)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert has_happened(step + 0.01 * noise)
    assert not has_happened(step + 0.5 * noise)
    assert noise_of(step + 0.5 * noise).item() == pytest.approx(0.5, rel=0.3)


@pytest.mark.parametrize("values", [[0.0], [0.0, 1.0], [0.5] * 9, [0.0, math.nan, 1.0, 1.0], [0.0, 1.0, 1.0, math.inf]])
def test_curves_that_cannot_show_a_change_show_none(values):
    assert not has_happened(torch.tensor(values))


def test_five_rows_can_show_a_change():
    assert has_happened(torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
    assert has_happened(torch.linspace(0, 1, 5).repeat_interleave(2))


def test_a_straight_course_is_no_noise_and_a_drift_at_the_end_is():
    ramp = torch.linspace(0, 1, 101)
    assert has_happened(ramp)
    assert noise_of(ramp).item() == pytest.approx(1.4826 * 0.03, rel=0.1)


@pytest.mark.parametrize(("d_model", "mean"), [(10, 0.49), (2, 0.81)])
def test_alignment_by_chance_of_one_pair_is_what_an_independent_computation_found(d_model, mean):
    assert alignment_by_chance(d_model, d_model, 1).matched.mean == pytest.approx(mean, abs=0.01)


def test_alignment_by_chance_is_that_of_random_heads_and_features():
    g = torch.Generator().manual_seed(0)
    n, D, R, P = 400, 12, 5, 3
    U, V = (torch.linalg.qr(torch.randn(n, D, R, generator=g)).Q for _ in "UV")
    query, key = (torch.randn(n, D, P, generator=g) for _ in "qk")
    pairs = align_pairs(
        signed_cosine_matrix(query, U), signed_cosine_matrix(key, V), torch.arange(R, 0, -1.0).expand(n, R)
    )
    cosines = (pairs.left + pairs.right) / 2
    chance = alignment_by_chance(D, R, P)
    drawn = (cosines.mean(-1), cosines.amin(-1), pairs.paired.mean(-1), pairs.paired.amin(-1))
    for of_this, found in zip(chance, drawn, strict=True):
        error = found.std().item() * (1 / n + 1 / 1000) ** 0.5
        assert of_this.mean == pytest.approx(found.mean().item(), abs=4 * error)
        assert len(of_this.draws) == 1000
        assert of_this.mean == pytest.approx(of_this.draws.mean())
        assert (found > of_this.extreme).double().mean() < 0.01
    more_pairs = alignment_by_chance(D, R, 9)  # four find no singular vector
    assert more_pairs.matched.mean < chance.matched.mean
    assert more_pairs.weakest.mean == 0


def test_a_level_on_another_scale_is_the_same_level():
    sizes = Sizes(10, 10, 1, 20, 2)
    level = LEVELS["aligned"].of(sizes)
    assert math.cos(math.radians(LEVELS["aligned, degrees"].of(sizes))) == pytest.approx(level)
    assert LEVELS["aligned, sine"].of(sizes) == pytest.approx(math.sqrt(1 - level**2))
    overlap = LEVELS["orthogonal"].of(sizes)
    assert math.sin(math.radians(LEVELS["orthogonal, degrees"].of(sizes))) == pytest.approx(overlap)
    assert all(math.isnan(LEVELS[name].of(Sizes())) for name in LEVELS)


def test_overlap_by_chance_is_that_of_random_features():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(400, 10, 20, generator=g)
    attended = torch.arange(20) < 2
    drawn, _ = attended_vs_rest(gram(X), attended)
    chance = overlap_by_chance(10, 20, 2)
    assert chance.mean == pytest.approx(drawn.mean().item(), abs=0.005)
    assert (drawn < chance.extreme).double().mean() < 0.01


@pytest.mark.parametrize(("d_model", "n_features"), [(2, 3), (5, 9), (10, 20), (7, 50)])
def test_no_features_overlap_less_on_average_than_the_bound(d_model, n_features):
    X = torch.randn(200, d_model, n_features, generator=torch.Generator().manual_seed(1))
    size = gram(X).abs()
    overlap = (size.sum((-2, -1)) - n_features) / (n_features * (n_features - 1))
    assert (overlap >= least_overlap(d_model, n_features)).all()


def test_antipodal_pairs_are_at_the_bound_and_so_are_not_orthogonal():
    X = torch.cat([torch.eye(10), -torch.eye(10)], dim=1)
    overlap, _ = attended_vs_rest(gram(X), torch.arange(20) < 2)
    assert overlap.item() == pytest.approx(1 / 18)
    assert least_overlap(10, 20) == pytest.approx(1 / 19)
    assert LEVELS["orthogonal"].of(Sizes(10, 10, 1, 20, 2)) == pytest.approx(1 / 38)


def test_a_level_is_not_known_where_a_size_is_missing():
    assert math.isnan(LEVELS["aligned"].of(Sizes()))
    assert math.isnan(LEVELS["orthogonal"].of(Sizes(d_model=10, n_features=5, n_attended=5)))
    assert LEVELS["aligned"].of(Sizes(n_singular=10, n_pairs=1)) == LEVELS["aligned"].of(Sizes(10, 10, 1))
