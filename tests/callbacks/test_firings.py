"""Firings against loops over single firings, for made-up heads and for a replayed model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.replays import replay
from transformers import AutoModelForCausalLM

from svf_lightning.callbacks import Firings
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import haar_orthogonal, n_recon, sparseness
from svf_lightning.probe import AttendedScores, FiringBatch, FiringRule, Probe
from svf_lightning.replay import FolderCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge
from svf_lightning.replay.decompose import HeadSpace

L, H, R, D = 2, 3, 17, 19
N_DRAWS = 5
QUIET = 4  # a head that never fires
NAMES = ("count", "sparseness", "sparseness_shared_rotation", "sparseness_independent_rotation", "n_recon",
         "n_recon_shared_rotation", "n_recon_at_most_4", "n_recon_at_most_4_rotated", "top_in_last_eighth",
         "sparseness_permuted_pairing", "sparseness_strongest_control", "last_eighth_by_chance")  # fmt: skip


def batch(n, seed, alone=()):
    """n firings of any heads but one; those in ``alone`` are of queries that see a single key."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    head = torch.randint(0, L * H - 1, (n,), generator=g)
    head[head >= QUIET] += 1
    query, raw, direction, raw_direction = (draw(n, R) for _ in range(4))
    key = raw - draw(n, R) / 2
    for values in (key, direction):
        values[list(alone)] = torch.nan
    S = draw(n, R).abs().sort(-1, descending=True).values
    scores = AttendedScores(query, key, direction, S, torch.rand(n, generator=g), None, None, raw, raw_direction)
    return FiringBatch(head, *(torch.arange(n) for _ in range(3)), scores)


def probes(batches, rules=None):
    """One probe for each list of batches, which are parts of one step."""
    heads = AttentionHeads(torch.zeros(L, H, R, D), torch.zeros(L, H, R, D))
    for i, some in enumerate(batches):

        def find_firings(rule, take, some=some):
            if rules is not None:
                rules.append(rule)
            for found in some:
                take(found)

        yield Probe(
            4, heads, find_firings=find_firings, part=(i, len(batches)), batch_dims=("layer", "head"), feature_dims=()
        )


def measured(callback, batches):
    shown = list(probes(batches))
    for probe in shown:
        callback.observe(probe)
    return {name: value[0] for name, value in callback.measure(Probe.stack(shown[:1])).items()}


BATCHES = [[batch(23, 0, alone=(3, 7)), batch(11, 1)], [batch(40, 2)]]


def singles(scores="relative"):
    """(head, query coordinates, key coordinates) of every firing that has a score."""
    for some in BATCHES:
        for found in some:
            for i, head in enumerate(found.head.tolist()):
                part = found.scores.taken(scores)
                if not part.key[i].isnan().any():
                    yield head, part.query[i].double(), part.key[i].double()


def share_of(values, condition):
    return np.mean([condition(value) for value in values])


@pytest.mark.parametrize("scores", ["relative", "raw"])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_statistics_of_each_head_are_those_of_its_firings_one_by_one(scores, share):
    found = measured(Firings(n_draws=N_DRAWS, scores=scores, recon_share=share, seed=2), BATCHES)
    rotations = haar_orthogonal(R, 2 * N_DRAWS, seed=2)[:N_DRAWS]
    for head in [None, *range(L * H)]:
        own = [(q, k) for h, q, k in singles(scores) if head in (None, h)]
        at = (
            {name: found[f"firings/{name}"] for name in NAMES}
            if head is None
            else {name: found[f"firings/head/{name}"].flatten()[head] for name in NAMES}
        )
        assert int(at["count"]) == len(own)
        if head == QUIET:
            assert all(at[name].isnan() for name in NAMES if name not in ("count", "last_eighth_by_chance"))
            continue
        counts = [int(n_recon(q * k, share)) for q, k in own]
        rotated = [int(n_recon((q @ a) * (k @ a), share)) for q, k in own for a in rotations[:4]]
        top = [int(np.argmax(q * k)) if (q * k).sum() > 0 else int(np.argmin(q * k)) for q, k in own]
        shared = [float(sparseness((q @ a) * (k @ a))) for q, k in own for a in rotations]
        assert float(at["n_recon"]) == np.median(counts)
        assert float(at["n_recon_shared_rotation"]) == np.median(rotated)
        assert float(at["n_recon_at_most_4"]) == pytest.approx(share_of(counts, lambda n: n <= 4))
        assert float(at["n_recon_at_most_4_rotated"]) == pytest.approx(share_of(rotated, lambda n: n <= 4))
        assert float(at["top_in_last_eighth"]) == pytest.approx(share_of(top, lambda k: k >= R - 2))
        assert float(at["last_eighth_by_chance"]) == pytest.approx(2 / R)  # an eighth of 17 are 2
        assert float(at["sparseness"]) == pytest.approx(np.mean([float(sparseness(q * k)) for q, k in own]), rel=1e-4)
        assert float(at["sparseness_shared_rotation"]) == pytest.approx(np.mean(shared), rel=1e-4)
        controls = ("shared_rotation", "independent_rotation", "permuted_pairing")
        lowest = min(float(at[f"sparseness_{control}"]) for control in controls)
        assert float(at["sparseness_strongest_control"]) == pytest.approx(lowest)


def test_histograms_count_every_firing_once_and_every_rotation_of_it():
    found = measured(Firings(n_draws=N_DRAWS), BATCHES)
    expected = {name: np.zeros((L * H, R + (name != "top")), dtype=int) for name in ("n_recon", "top")}
    for head, q, k in singles():
        expected["n_recon"][head, int(n_recon(q * k))] += 1
        expected["top"][head, int(torch.where((q * k).sum() < 0, -q * k, q * k).argmax())] += 1
    np.testing.assert_array_equal(found["firings/n_recon_histogram"].flatten(0, 1), expected["n_recon"])
    np.testing.assert_array_equal(found["firings/top_index_histogram"].flatten(0, 1), expected["top"])
    rotated = found["firings/n_recon_histogram_rotated"].flatten(0, 1)
    np.testing.assert_array_equal(rotated.sum(-1), 4 * expected["n_recon"].sum(-1))  # N_recon is counted in four
    assert not found["firings/n_recon_histogram"].is_floating_point()


def test_parts_of_a_step_add_up_whatever_comes_with_what():
    whole = [found for some in BATCHES for found in some]
    one = measured(Firings(n_draws=N_DRAWS), [whole])
    other = measured(Firings(n_draws=N_DRAWS), [[found] for found in reversed(whole)])
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, equal_nan=True, msg=name)


def test_many_firings_are_measured_some_at_a_time(monkeypatch):
    plain = measured(Firings(n_draws=N_DRAWS), BATCHES)
    monkeypatch.setattr("svf_lightning.callbacks.firings._CHUNK", 7)
    for name, value in measured(Firings(n_draws=N_DRAWS), BATCHES).items():
        torch.testing.assert_close(value, plain[name], equal_nan=True, msg=name)


def test_the_next_step_begins_with_nothing():
    callback = Firings(n_draws=N_DRAWS)
    first, second = (measured(callback, [some]) for some in BATCHES)
    assert int(first["firings/count"]) == 32
    assert int(second["firings/count"]) == 40
    assert callback.measure(Probe.stack([Probe(0)])) == {}


def test_a_step_without_a_firing_has_a_count_of_zero_and_no_other_number():
    found = measured(Firings(), [[], []])
    assert int(found["firings/count"]) == 0
    assert all(found[f"firings/{name}"].isnan() for name in NAMES if name not in ("count", "last_eighth_by_chance"))
    assert (found["firings/top_index_histogram"] == 0).all()


def test_a_module_that_does_not_tell_of_its_firings_is_left_out():
    callback = Firings()
    callback.observe(Probe(0))
    assert callback.measure(Probe.stack([Probe(0)])) == {}


def test_what_counts_as_a_firing_is_asked_for():
    rules = []
    callback = Firings(tau="1/(n+1)", first_token=True, self_attention=False, every_query=False)
    for probe in probes([[]], rules):
        callback.observe(probe)
    assert rules == [FiringRule("1/(n+1)", first_token=True, self_attention=False, every_query=False)]


def test_raw_scores_of_a_module_that_shows_none_are_an_input_error():
    (some,) = BATCHES[1]
    found = some._replace(scores=replace(some.scores, raw_key=None))
    with pytest.raises(InputError, match=r"scores='raw'.*relative"):
        measured(Firings(scores="raw"), [[found]])


@pytest.mark.parametrize(
    "options",
    [{"tau": 1.0}, {"tau": "1/n"}, {"scores": "softmax"}, {"recon_share": 0.0}, {"recon_share": 1.5}, {"n_draws": 0}],
    ids=str,
)
def test_options_out_of_range_are_input_errors(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Firings(**options)


def test_its_options_are_its_arguments():
    given = {
        "tau": 0.3, "first_token": True, "self_attention": False, "every_query": False, "scores": "raw", "recon_share": 0.7, 
        "n_draws": 4, "seed": 1,
    }  # fmt: skip
    assert Firings(**given).options() == given


def test_a_replay_stores_the_firings_of_all_its_prompts_whatever_the_batch_size(suite, tmp_path):
    callback = {"tau": 0.25, "n_draws": 2}
    source = FolderCheckpoints(str(suite), steps=[8])
    one, other = (
        replay(source, tmp_path / str(size), callbacks=(Firings(**callback),), batch_size=size).isel(step=0)
        for size in (3, 13)
    )
    space = HeadSpace(make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval()))
    expected = np.zeros((2, 3), dtype=int)
    for prompt in ReplayData(source, n_prompts=13).prompts:
        tokens = torch.tensor([prompt.tokens])
        for query in range(1, len(prompt.tokens)):
            seen = space.observe(tokens, torch.tensor([query]))
            fires = (seen.pattern[:, :, 0] >= 0.25) & (seen.scores[:, :, 0] > 0)
            expected += fires[..., 1 : query + 1].sum(-1).numpy()
    assert expected.sum() > 50
    np.testing.assert_array_equal(one["firings/head/count"], expected)
    assert int(one["firings/count"]) == expected.sum()
    for name in one.data_vars:
        if str(name).startswith("firings/"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=2e-3, err_msg=str(name))
