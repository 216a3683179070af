"""Means over the batches of a loop, one per instance."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.errors import InputError
from svf_lightning.metrics import InstanceMean

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


def batches(n_batches, *shape, dtype=torch.float64, seed=0):
    return torch.randn(n_batches, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@SETTINGS
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(), (5,), (2, 3)]),
    weights=st.lists(st.floats(0.5, 64), min_size=1, max_size=7),
)
def test_mean_equals_the_weighted_numpy_average_over_batches(dtype, seed, shape, weights):
    values = batches(len(weights), *shape, dtype=dtype, seed=seed)
    metric = InstanceMean(shape)
    for value, weight in zip(values, weights, strict=True):
        metric.update(value, weight)
    got = metric.compute()
    assert got.shape == shape
    np.testing.assert_allclose(
        got.numpy(), np.average(values.double().numpy(), axis=0, weights=weights), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_mean_of_a_single_instance_keeps_its_shape(shape):
    metric = InstanceMean(shape)
    metric.update(torch.full(shape, 2.0))
    assert metric.mean().shape == shape
    assert metric.mean().flatten().tolist() == [2.0]


def test_weight_is_one_by_default():
    values = batches(5, 3)
    metric = InstanceMean((3,))
    for value in values:
        metric.update(value)
    torch.testing.assert_close(metric.compute(), values.mean(0))


def test_many_small_float32_values_are_summed_in_float64():
    metric = InstanceMean((1,))
    metric.update(torch.tensor([2.0**25]))
    for _ in range(1000):
        metric.update(torch.tensor([1.0]))
    assert metric.compute().item() == (2**25 + 1000) / 1001


def test_reset_forgets_everything():
    metric = InstanceMean((3,))
    metric.update(torch.full((3,), 100.0), weight=7)
    metric.reset()
    metric.update(torch.tensor([1.0, 2.0, 3.0]), weight=2)
    assert metric.compute().tolist() == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_mean_before_the_first_update_is_nan():
    metric = InstanceMean((2, 3))
    assert metric.compute().shape == (2, 3)
    assert metric.compute().isnan().all()
    metric.update(torch.ones(2, 3))
    metric.reset()
    assert metric.compute().isnan().all()


def test_update_does_not_change_its_argument_or_another_metric():
    first, second, value = InstanceMean((3,)), InstanceMean((3,)), torch.ones(3, dtype=torch.float64)
    first.update(value)
    first.update(value)
    assert value.tolist() == [1, 1, 1]
    second.update(2 * value)
    assert second.compute().tolist() == [2, 2, 2]


def test_update_keeps_no_graph():
    metric = InstanceMean((3,))
    metric.update(torch.ones(3, requires_grad=True) * 2)
    assert not metric.compute().requires_grad


def test_nan_in_one_instance_leaves_the_others_alone():
    metric = InstanceMean((3,))
    for value in ([1.0, torch.nan, 3.0], [3.0, 4.0, 5.0]):
        metric.update(torch.tensor(value))
    got = metric.compute()
    assert got[1].isnan()
    assert got[[0, 2]].tolist() == [2, 4]


@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=str)
def test_value_of_the_wrong_shape_is_an_error(shape):
    with pytest.raises(InputError, match="value"):
        InstanceMean((3,)).update(torch.ones(shape))


@pytest.mark.parametrize(
    "duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copy_goes_on_from_where_the_original_stood(duplicate):
    values = batches(5, 3)
    metric = InstanceMean((3,))
    for value in values[:2]:
        metric.update(value, 3)
    other = duplicate(metric)
    assert torch.equal(other.compute(), metric.compute())
    for value in values[2:]:
        other.update(value, 3)
    torch.testing.assert_close(other.compute(), values.mean(0))
    torch.testing.assert_close(metric.compute(), values[:2].mean(0))
    other.reset()
    other.update(values[0])
    assert torch.equal(other.compute(), values[0])


def test_call_returns_the_value_of_the_batch_and_accumulates():
    values = batches(5, 3)
    metric = InstanceMean((3,))
    for value in values:
        torch.testing.assert_close(metric(value, 2), value)
    torch.testing.assert_close(metric.compute(), values.mean(0))


def test_states_of_two_processes_add_up():
    """What torchmetrics does between processes: sum each state."""
    values, weights = batches(5, 3), [1.0, 2.0, 3.0, 4.0, 5.0]
    parts = [InstanceMean((3,)) for _ in range(2)]
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        parts[i % 2].update(value, weight)
    merged = InstanceMean((3,))
    merged.update(values[0])  # a state that merging has to take into account
    for part in parts:
        merged.merge_state(part)
    expected = np.average(values[[0, 0, 1, 2, 3, 4]].numpy(), axis=0, weights=[1.0, *weights])
    np.testing.assert_allclose(merged.compute().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_result_stays_on_the_device_of_the_metric(device):
    values = batches(5, 3, dtype=torch.float32)
    metric = InstanceMean((3,)).to(device)
    for value in values:
        metric.update(value.to(device))
    assert metric.compute().device.type == device
    torch.testing.assert_close(metric.compute().cpu(), values.double().mean(0))
