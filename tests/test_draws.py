"""Draws that depend on a key alone."""

import numpy as np
import pytest
import torch

from svf_lightning.draws import keyed_generator, keyed_seed

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((0, 0, 0), 7896617691693857887),
        ((3, 1, 1000), 8669489807661324600),
        ((2**40, 7), 9205147714447482943),
    ],
)
def test_a_key_has_the_seed_that_it_always_had(key, seed):
    """A run of an earlier version goes on with the same numbers."""
    assert keyed_seed(*key) == seed


def test_a_seed_is_an_integer_that_every_generator_takes():
    for step in range(200):
        seed = keyed_seed(step)
        assert type(seed) is int
        assert 0 <= seed < 2**63


def test_other_keys_of_one_length_have_other_seeds_also_in_another_order():
    """A key that is longer by zeros alone is the same key to numpy."""
    for keys in ({(a, b) for a in range(40) for b in range(40)}, {(a, 3, b) for a in range(40) for b in range(40)}):
        assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert keyed_seed(1, 2) != keyed_seed(2, 1)


def test_neighbouring_keys_give_unrelated_draws():
    draws = np.stack([torch.randn(4000, generator=keyed_generator(a, b)).numpy() for a in range(4) for b in range(4)])
    correlation = np.corrcoef(draws) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("device", DEVICES)
def test_a_generator_draws_the_same_whatever_was_drawn_before(device):
    first = torch.rand(9, generator=keyed_generator(3, 4, device=device), device=device)
    torch.manual_seed(1)
    torch.rand(5, generator=keyed_generator(3, 5, device=device), device=device)
    state = torch.get_rng_state()
    again = torch.rand(9, generator=keyed_generator(3, 4, device=device), device=device)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert first.device.type == device


def test_a_key_below_zero_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        keyed_seed(3, -1)
