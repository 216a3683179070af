"""Shape of a singular spectrum: NumPy references, ranges, closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svf_lightning.metrics import n_significant, sigma_ratio, stable_rank

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SETTINGS = settings(deadline=None, max_examples=50, derandomize=True)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
SPECTRA = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=11).map(lambda s: sorted([*s, 1.0], reverse=True))


@DTYPES
@SETTINGS
@given(spectrum=SPECTRA, threshold=st.sampled_from([0.05, 0.25, 0.5]))
def test_spectrum_measures_equal_numpy_and_stay_in_their_range(dtype, spectrum, threshold):
    S = torch.tensor(spectrum, dtype=dtype)
    s = S.numpy()
    assert n_significant(S, threshold).item() == sum(x > dtype_number(threshold, dtype) for x in s.tolist())
    assert stable_rank(S).item() == pytest.approx(np.sum(s.astype(float) ** 2) / s[0] ** 2, rel=TOLERANCE[dtype])
    assert sigma_ratio(S).item() == pytest.approx(s[1] / s[0], rel=TOLERANCE[dtype])
    assert 1 <= n_significant(S, threshold) <= len(s)
    assert 1 <= stable_rank(S) <= len(s) * (1 + TOLERANCE[dtype])
    assert 0 <= sigma_ratio(S) <= 1
    assert stable_rank(S).dtype == sigma_ratio(S).dtype == dtype
    assert not n_significant(S).is_floating_point()


def dtype_number(value, dtype):
    """A Python number as this dtype holds it."""
    return torch.tensor(value, dtype=dtype).item()


@DTYPES
def test_stable_rank_is_the_frobenius_norm_over_the_spectral_norm_squared(dtype):
    omega = torch.randn(3, 11, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = torch.linalg.svdvals(omega).to(dtype)
    expected = [np.linalg.norm(m, "fro") ** 2 / np.linalg.norm(m, 2) ** 2 for m in omega.numpy()]
    np.testing.assert_allclose(stable_rank(S).double().numpy(), expected, rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("n_singular", [1, 2, 7])
def test_rank_one_head(n_singular, dtype):
    S = torch.zeros(n_singular, dtype=dtype)
    S[0] = 4.9
    assert n_significant(S).item() == 1
    assert stable_rank(S).item() == 1
    assert sigma_ratio(S).item() == 0


@DTYPES
@pytest.mark.parametrize("n_singular", [2, 7])
def test_identity_head_uses_all_its_dimensions(n_singular, dtype):
    S = torch.full((3, n_singular), 2.5, dtype=dtype)
    assert n_significant(S).tolist() == [n_singular] * 3
    assert stable_rank(S).tolist() == [n_singular] * 3
    assert sigma_ratio(S).tolist() == [1] * 3


@pytest.mark.parametrize("n_singular", [1, 2, 7])
def test_zero_head_has_no_significant_value_and_no_shape(n_singular):
    S = torch.zeros(2, n_singular)
    S[1] = 1
    assert n_significant(S).tolist() == [0, n_singular]
    for measure in (stable_rank, sigma_ratio):
        got = measure(S)
        assert got[0].isnan()
        assert torch.isfinite(got[1])


@pytest.mark.parametrize("n_singular", [1, 2, 7])
def test_nan_head_has_no_shape_and_leaves_the_others_alone(n_singular):
    S = torch.linspace(3, 1, n_singular).repeat(3, 1)
    clean = S.clone()
    S[1] = torch.nan
    for measure in (stable_rank, sigma_ratio):
        got = measure(S)
        assert got[1].isnan()
        assert torch.equal(got[[0, 2]], measure(clean)[[0, 2]])
    assert torch.equal(n_significant(S)[[0, 2]], n_significant(clean)[[0, 2]])


def test_threshold_is_a_fraction_of_the_largest_value_and_five_percent_by_default():
    S = torch.tensor([100.0, 50.0, 6.0, 5.1, 4.9, 0.0])
    assert n_significant(S).item() == 4
    assert n_significant(S, 0.5).item() == 1  # strictly above
    assert n_significant(S, 0.49).item() == 2
    assert n_significant(S, 0.001).item() == 5


@DTYPES
@SETTINGS
@given(spectrum=SPECTRA, exponent=st.integers(-30, 30))
def test_scaling_the_head_changes_nothing(dtype, spectrum, exponent):
    S = torch.tensor([x if x > 1e-20 else 0.0 for x in spectrum], dtype=dtype)
    for measure in (n_significant, stable_rank, sigma_ratio):  # powers of two are exact
        assert torch.equal(measure(S * 2.0**exponent), measure(S))


@pytest.mark.parametrize("measure", [n_significant, stable_rank, sigma_ratio])
@pytest.mark.parametrize("n_singular", [1, 5])
def test_batch_equals_one_by_one(measure, n_singular):
    S = torch.rand(2, 3, n_singular, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    got = measure(S)
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, torch.stack([torch.stack([measure(s) for s in row]) for row in S]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("measure", [n_significant, stable_rank, sigma_ratio])
def test_results_stay_on_their_device_and_agree_with_the_cpu(measure, device):
    S = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    got = measure(S.to(device))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), measure(S))
