import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from svf_lightning.draws import keyed_generator
from svf_lightning.errors import InputError
from svf_lightning.toy import ToyData, sparse_activations
from svf_lightning.toy.features import LEAST_PROBABILITY, correlated_uniform


def data(**options):
    return ToyData(**{"n_features": 11, "n_instances": 3, "batch_size": 13, "context_length": 5, **options})


def test_activations_are_bernoulli_times_uniform():
    p = 0.3
    f = sparse_activations(torch.rand(400_000, generator=torch.Generator().manual_seed(1)), p)
    active = f > 0
    assert active.float().mean().item() == pytest.approx(p, abs=0.004)
    quantiles = np.quantile(f[active].numpy(), [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles, [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.006)


def test_with_probability_one_every_feature_is_active():
    assert (data(feature_probability=1.0).draw(0) > 0).float().mean() > 0.999


def test_the_draw_of_a_step_depends_on_seed_and_step_alone():
    a, b = data(seed=5), data(seed=5)
    b.draw(3)  # an earlier draw leaves no trace
    torch.testing.assert_close(a.draw(7), b.draw(7), rtol=0, atol=0)
    assert not torch.equal(a.draw(7), a.draw(8))
    assert not torch.equal(a.draw(7), data(seed=6).draw(7))


def test_the_draw_ignores_and_spares_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = data().draw(4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, data().draw(4))


def test_neighbouring_steps_and_seeds_are_uncorrelated():
    draws = np.stack([data(seed=s).draw(t).numpy().ravel() for s in range(4) for t in range(4)])
    correlation = np.corrcoef(draws) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(draws.shape[1])


def test_shared_streams_give_all_instances_one_draw_each_with_its_own_p():
    many = data(feature_probability=[0.1, 0.5, 1.0], streams="shared").draw(2)
    for i, p in enumerate((0.1, 0.5, 1.0)):
        alone = data(n_instances=1, feature_probability=p).draw(2)
        torch.testing.assert_close(many[i], alone[0], rtol=0, atol=0)


def test_separate_streams_give_each_instance_the_draw_it_would_have_alone():
    many = data(seed=20, streams="separate").draw(2)
    assert many.shape[0] == 3
    for i in range(3):
        alone = data(n_instances=1, seed=20 + i, streams="separate").draw(2)
        torch.testing.assert_close(many[i], alone[0], rtol=0, atol=0)
    assert not torch.equal(many[0], many[1])


def test_training_validation_and_test_draws_never_meet():
    d = data(held_out_batches=2)
    training, validation, test = d.draw(0), *(next(iter(x)) for x in (d.val_dataloader(), d.test_dataloader()))
    assert not torch.equal(training, validation)
    assert not torch.equal(validation, test)
    assert len(d.test_dataloader()) == 2 == len(list(d.test_dataloader()))


@pytest.mark.parametrize("p", [0.0, -0.1, 1.01, float("nan"), [0.1, 0.2], [0.1, 0.2, 0.0]])
def test_a_probability_outside_its_range_or_number_is_refused(p):
    with pytest.raises(
        InputError, match=r"feature_probability.*\(0, 1\]|feature_probability has 2 values for 3 instances"
    ):
        data(feature_probability=p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"context_length": -1}, "context_length=-1"),
        ({"held_out_batches": 0}, "held_out_batches=0"),
        ({"streams": "own"}, "streams='own'"),
        ({"seed": [1, 2, 3]}, "separate"),
        ({"seed": [1, 2], "streams": "separate"}, "2 seeds for 3 instances"),
        ({"seed": -1}, "data.seed=-1"),
    ],
)
def test_other_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        data(**options)


def test_a_probability_at_which_nothing_ever_happens_is_refused_with_the_limit():
    u = torch.tensor([1 - 2.0**-24])  # the largest number that is drawn
    assert sparse_activations(u, LEAST_PROBABILITY).item() > 0
    assert sparse_activations(u, LEAST_PROBABILITY / 2).item() == 0
    assert data(feature_probability=LEAST_PROBABILITY).n_draws == 1
    with pytest.raises(InputError, match=r"feature_probability.*at least 1\.19.*e-07"):
        data(feature_probability=LEAST_PROBABILITY / 2)


# ---- frequencies and correlations


def test_later_features_are_rarer_by_a_power_of_their_rank():
    f = data(n_features=9, batch_size=20_000, feature_probability=0.4, frequency_decay=[0.0, 0.5, 1.0]).draw(1)
    for i, decay in enumerate((0.0, 0.5, 1.0)):
        expected = 0.4 * np.arange(1, 10) ** -decay
        np.testing.assert_allclose((f[i] > 0).float().mean((0, 1)), expected, atol=0.006)
        active = f[i, ..., 8]
        np.testing.assert_allclose(np.quantile(active[active > 0], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02)


def test_without_decay_and_correlation_draws_are_what_they_were():
    uniform = torch.rand((13, 6, 11), generator=keyed_generator(0, 0, 4, device="cpu"))
    for options in ({}, {"frequency_decay": 0.0, "feature_correlation": 0.0}):
        assert torch.equal(data(**options).draw(4)[0], sparse_activations(uniform, 0.1))
    # and what another instance does changes nothing
    many = data(frequency_decay=[0.0, 1.0, 0.0], feature_correlation=[0.0, 0.0, 0.5])
    assert torch.equal(many.draw(4)[0], data(n_instances=1).draw(4)[0])
    assert many.draw(4).shape[0] == 3


@given(p=st.sampled_from([0.1, 0.4]), rho=st.sampled_from([0.2, 0.5, 0.9]), decay=st.sampled_from([0.0, 0.6]))
@settings(max_examples=6, deadline=None)
def test_correlated_features_keep_their_probabilities_and_are_active_together_as_a_bivariate_normal_has_it(
    p, rho, decay
):
    one = {"n_instances": 1, "n_features": 4, "batch_size": 40_000, "feature_probability": p}
    f = data(**one, feature_correlation=rho, frequency_decay=decay).draw(2)[0]
    active = (f > 0).reshape(-1, 4).double()
    probability = p * np.arange(1, 5) ** -decay
    error = 4 / np.sqrt(len(active))
    np.testing.assert_allclose(active.mean(0), probability, atol=error)
    for i, j in ((0, 1), (1, 3)):
        # P(g_i > t_i, g_j > t_j) = P(-g_i < -t_i, -g_j < -t_j)
        below = norm.ppf(probability[[i, j]])
        together = multivariate_normal.cdf(below, mean=[0, 0], cov=[[1, rho], [rho, 1]])
        assert (active[:, i] * active[:, j]).mean().item() == pytest.approx(together, abs=error)
    quantiles = np.quantile(f[..., 0][f[..., 0] > 0], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, [0.25, 0.5, 0.75], atol=0.02)


def test_correlated_uniform_numbers_have_the_correlation_behind_them_and_are_uniform():
    generator = torch.Generator().manual_seed(3)
    u, z = torch.rand(100_000, 3, generator=generator), torch.randn(100_000, generator=generator)
    v = correlated_uniform(u, z, 0.6)
    np.testing.assert_allclose(np.quantile(v, np.linspace(0.1, 0.9, 9)), np.linspace(0.1, 0.9, 9), atol=0.01)
    behind = torch.special.ndtri(v.double()).T
    np.testing.assert_allclose(np.corrcoef(behind), 0.4 * np.eye(3) + 0.6, atol=0.01)
    edge = correlated_uniform(torch.tensor([[0.0, 1 - 2.0**-24]]), torch.tensor([0.3]), 0.5)
    assert edge[0, 0] == 0
    assert 0.99 < edge[0, 1] <= 1


def test_tokens_of_different_positions_stay_independent():
    f = data(n_instances=1, n_features=2, batch_size=30_000, context_length=1, feature_correlation=0.9).draw(0)[0]
    query, key = (f[:, i] > 0 for i in (0, 1))
    assert np.corrcoef(query[:, 0], key[:, 1])[0, 1] == pytest.approx(0, abs=0.02)
    assert np.corrcoef(query[:, 0], query[:, 1])[0, 1] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_decay": -0.1}, r"frequency_decay=-0.1.*\[0, inf\).*--data.frequency_decay"),
        ({"frequency_decay": 9.0}, r"frequency_decay='9'.*the last of 11 features.*1.19\d*e-07"),
        ({"feature_correlation": 1.0}, r"feature_correlation=1.0.*\[0, 1\)"),
        ({"feature_correlation": -0.2}, r"feature_correlation=-0.2.*--data.feature_correlation"),
        ({"feature_correlation": [0.1, 0.2]}, "2 values for 3 instances"),
    ],
)
def test_frequencies_and_correlations_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        data(**options)


def test_attended_pairs_are_those_whose_key_carries_the_attended_feature():
    data = ToyData(n_features=11, n_instances=3, batch_size=64, context_length=5, streams="separate", seed=[4, 5, 6])
    pairs = torch.tensor([[0, 7], [2, 3]])
    queries, keys = data.attended(pairs, 17)
    assert queries.shape == keys.shape == (3, 17, 11)
    carries = [(queries[..., i] > 0) & (keys[..., j] > 0) for i, j in pairs.tolist()]
    # relative to the other keys, a feature that the key has is positive unless the others have more of it
    attends = [(queries[..., i] > 0) for i, _ in pairs.tolist()]
    assert torch.stack(attends).any(0).all()
    assert torch.stack(carries).any(0).float().mean() > 0.8
    assert torch.equal(queries, data.attended(pairs, 17)[0])
    assert torch.equal(queries[:, :5], data.attended(pairs, 5)[0])


def test_too_rare_pairs_and_a_single_key_are_input_errors():
    rare = ToyData(n_features=11, batch_size=4, feature_probability=1e-4)
    with pytest.raises(InputError, match="n_attended"):
        rare.attended(torch.tensor([[0, 1]]), 50)
    with pytest.raises(InputError, match="context_length"):
        ToyData(context_length=1).attended(torch.tensor([[0, 1]]), 1)
