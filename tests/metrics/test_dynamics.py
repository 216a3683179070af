"""When a quantity has changed: hand-made series, and a plain loop as reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import time_of_change

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
