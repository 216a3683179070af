"""DirectionIntervention: what is moved along, how far, and what the model does then."""

import math

import numpy as np
import pytest
import torch
from helpers.probes import parts
from helpers.replays import replay
from scipy.stats import t
from transformers import AutoModelForCausalLM

from svf_lightning.callbacks.direction_intervention import (
    CHOICES,
    CONTROLS,
    EFFECTS,
    SIDES,
    SOURCES,
    DirectionIntervention,
    _count_beyond,
)
from svf_lightning.errors import InputError
from svf_lightning.probe import Outcome, Probe
from svf_lightning.replay import CheckpointReplay, FolderCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge

R, D, N = 6, 9, 5
MOVES = 8 * 2 * (2 + 1 + 1 + 3) - 2  # choices, sides, settings; "matched" is none of a patch


class Recorder:
    """Keeps the moves that it is asked for; the more a move leads away from 0, the more changes."""

    def __init__(self, probe, seed=0, sources=("swapped",)):
        g = torch.Generator().manual_seed(seed)
        self.probe, self.sources, self.variants = probe, list(sources), []
        self.bases = torch.linalg.qr(torch.randn(2, 6, N, D, R, generator=g))[0]
        self.x = torch.randn(N, D, generator=g)

    def singular_vectors(self, head, side):
        return self.bases[SIDES.index(side), head]

    def residual_draws(self, head, n_draws, generator):
        return torch.linalg.qr(torch.randn(N, D, n_draws, generator=generator))[0]

    def run_each(self, variants):
        self.variants += variants
        return [self.outcome(moves) for moves in variants]

    def outcome(self, moves):
        attention, change = self.probe.scores.attention.clone().flatten(0, 1), torch.zeros(N)
        for move in moves:
            length = (self.x[:, None] @ move.directions).norm(dim=(-2, -1))
            attention[move.head] -= length
            change = change + length
        return Outcome(attention.view(2, 3, N), self.probe.scores.logit_difference - change, change**2)


def recorded(n_parts=2, **options):
    """What the callback measures, and the probes and moves that it came from."""
    options = {"numbers": (1, 3), **options}
    callback, shown, recorders = DirectionIntervention(**options), [], []
    for i, probe in enumerate(parts(n_parts, R)):
        recorders.append(Recorder(probe, i))
        shown.append(
            Probe(
                4, scores=probe.scores, part=probe.part, interventions=recorders[-1], batch_dims=("layer", "head"),
                coords={"prompt_template": (("prompt",), torch.arange(n_parts * N) % 4)},
            )
        )  # fmt: skip
        callback.observe(shown[-1])
    return {name: value[0] for name, value in callback.measure(shown[0]).items()}, shown, recorders


def of_all(shown, name):
    return torch.cat([getattr(probe.scores, name).flatten(0, 1) for probe in shown], 1)


def by_choice(recorder, setting, side):
    """Moves of one setting, in the order ablated (1, 3), boosted, patched, alone (3 heads)."""
    n = 0
    found = {}
    for i in range(7):
        for each in SIDES:
            for choice in CHOICES:
                if i == 3 and choice == "matched":
                    continue
                n += 1
                if (i, each) == (setting, side):
                    found[choice] = recorder.variants[n]
    return found


def test_all_variants_are_run_at_once_after_an_untouched_one():
    _, _, recorders = recorded()
    for recorder in recorders:
        assert recorder.variants[0] == []
        assert len(recorder.variants) == 1 + MOVES


def test_the_heads_of_the_task_are_those_with_most_attention_together_and_each_alone():
    found, shown, (recorder, _) = recorded()
    expected = of_all(shown, "attention").mean(-1).topk(3).indices.tolist()
    assert found["directions/layer_head"].tolist() == expected
    assert [move.head for move in by_choice(recorder, 0, "query")["top"]] == expected
    for i, head in enumerate(expected):
        assert {move.head for moves in by_choice(recorder, 4 + i, "key").values() for move in moves} == {head}


@pytest.mark.parametrize("side", SIDES)
def test_directions_are_those_of_the_largest_contributions_and_controls_move_as_far(side):
    _, shown, (recorder, _) = recorded()
    contributions = shown[0].scores.contributions.flatten(0, 1)
    for setting, n in ((0, 1), (1, 3)):
        moves = by_choice(recorder, setting, side)
        for place, move in enumerate(moves["top"]):
            basis, own = recorder.singular_vectors(move.head, side), contributions[move.head]
            towards = own * own.sum(-1, keepdim=True).sign()
            for i in range(N):
                index = towards[i].topk(n).indices
                assert torch.equal(move.directions[i], basis[i][:, index])
            assert move.as_far_as is None
            assert torch.equal(moves["spectrum"][place].directions, basis[..., :n])
            assert torch.equal(moves["whole"][place].directions, basis)
            for name in CONTROLS:
                control = moves[name][place]
                assert torch.equal(control.as_far_as, move.directions)
                eye = torch.eye(n).expand(N, -1, -1)
                torch.testing.assert_close(control.directions.mT @ control.directions, eye, rtol=0, atol=1e-5)
            for name in ("rotated", "random"):  # inside the head's own space, and new for each pair
                inside = basis.mT @ moves[name][place].directions
                torch.testing.assert_close(basis @ inside, moves[name][place].directions, rtol=0, atol=1e-5)
                assert (inside[0] - inside[1]).abs().max() > 0.01


def test_the_rotated_directions_are_those_that_contribute_most_in_that_basis():
    """The n of them hold more of the score than n random ones of the same space do."""
    _, shown, (recorder, _) = recorded()
    scores = shown[0].scores
    for side in SIDES:
        moves = by_choice(recorder, 1, side)
        held = {"rotated": [], "random": []}
        for name, kept in held.items():
            for move in moves[name]:
                query, key, direction = (
                    getattr(scores, part).flatten(0, 1)[move.head] for part in ("query", "key", "direction")
                )
                S = scores.S.flatten(0, 1)[move.head]
                left, right = (query, key) if side == "query" else (query * S, direction)
                inside = recorder.singular_vectors(move.head, side).mT @ move.directions  # [N, R, n]
                part = ((left[:, None] @ inside) * (right[:, None] @ inside)).sum((-2, -1))
                kept.append(part * (left * right).sum(-1).sign())
        assert torch.stack(held["rotated"]).mean() > torch.stack(held["random"]).mean() + 0.5


def test_matched_pairs_take_as_much_off_the_score_as_the_top_ones():
    _, shown, (recorder, _) = recorded()
    contributions = shown[0].scores.contributions.flatten(0, 1)
    for setting, factor in ((1, 0.0), (2, 2.0)):
        for side in SIDES:
            moves = by_choice(recorder, setting, side)
            for top, matched in zip(moves["top"], moves["matched"], strict=True):
                basis, own = recorder.singular_vectors(top.head, side), contributions[top.head]
                in_top, in_matched = (
                    (basis.mT @ move.directions).square().sum(-1).round() for move in (top, matched)
                )  # which pairs [N, R]
                assert (in_top * in_matched).max() == 0
                possible = in_matched.any(-1)
                assert torch.equal(possible, torch.isfinite(matched.factor))
                changes = (own * in_top).sum(-1) * (factor - 1), (own * in_matched).sum(-1) * (matched.factor - 1)
                torch.testing.assert_close(changes[1][possible], changes[0][possible], rtol=1e-4, atol=1e-5)


def test_another_head_is_one_of_the_same_layer_and_if_possible_none_of_the_tasks():
    found, shown, (recorder, _) = recorded(n_task_heads=1)
    (head,) = found["directions/layer_head"].tolist()
    moves = next(v for v in recorder.variants[1:] if v[0].as_far_as is not None and len(v) == 1)
    assert moves[0].head == head
    layer = range(head - head % 3, head - head % 3 + 3)
    own = shown[0].scores.contributions.flatten(0, 1)
    candidates = []
    for other in set(layer) - {head}:
        towards = own[other] * own[other].sum(-1, keepdim=True).sign()
        index = towards.argmax(-1)
        candidates.append(recorder.singular_vectors(other, "query")[torch.arange(N), :, index])
    at = 1 + CHOICES.index("other_head")
    direction = recorder.variants[at][0].directions[..., 0]
    assert any(torch.equal(direction, candidate) for candidate in candidates)


def test_effects_are_means_over_templates_of_the_changes():
    found, shown, recorders = recorded()
    attention = of_all(shown, "attention")
    heads = found["directions/layer_head"].tolist()
    changes = []
    for probe, recorder in zip(shown, recorders, strict=True):
        for choice, moves in by_choice(recorder, 1, "key").items():
            outcome = recorder.outcome(moves)
            on_key = (outcome.attention - probe.scores.attention).flatten(0, 1)[heads].mean(0)
            difference = outcome.logit_difference - probe.scores.logit_difference
            changes.append((choice, torch.stack([on_key, difference, outcome.divergence])))
    for j, choice in enumerate(CHOICES):
        values = torch.cat([change for name, change in changes if name == choice], -1)
        if choice == "matched":
            continue  # some pairs have none
        for i, effect in enumerate(EFFECTS):
            expected = [float(values[i, k::4].mean()) for k in range(4)]
            np.testing.assert_allclose(found[f"directions/ablated/{effect}"][1, 1, j], expected, rtol=1e-4, atol=1e-6)
    assert found["directions/ablated/attention"].shape == (2, 2, len(CHOICES), 4)
    assert attention.shape[1] == 10
    assert found["directions/alone/divergence"].shape == (3, 2, len(CHOICES), 4)
    patched = found["directions/patched/logit_difference"]
    assert patched.shape == (len(SOURCES), 2, len(CHOICES), 4)
    assert patched[1:].isnan().all()  # these prompts have one counterpart alone
    assert patched[0, :, CHOICES.index("matched")].isnan().all()
    assert not patched[0, :, 0].isnan().any()


def test_the_strongest_control_is_the_one_that_moves_most_in_each_template():
    found, _, _ = recorded()
    for j, side in enumerate(SIDES):
        for effect, strongest in zip(EFFECTS, (torch.amin, torch.amin, torch.amax), strict=True):
            ablated = found[f"directions/ablated/{effect}"][1, j]
            name = f"directions/{side}/{effect}"
            expected = strongest(ablated[1:6], 0)
            torch.testing.assert_close(found[f"template/{name}_strongest_control"], expected)
            torch.testing.assert_close(found[f"{name}_strongest_control"], expected.mean())
            torch.testing.assert_close(found[f"template/{name}"], ablated[0])
            torch.testing.assert_close(found[name], ablated[0].mean())


def test_heads_are_counted_that_are_beyond_every_control_with_their_whole_interval():
    g = torch.Generator().manual_seed(0)
    top, controls = torch.randn(3, 16, generator=g) / 4, torch.randn(3, 5, 16, generator=g) / 4
    top[0] += 1  # beyond all
    top[1] += 1
    controls[1, 2] += 0.85  # one of them is as strong
    controls[0, 4] = torch.nan  # there is no such control
    assert float(_count_beyond(top, controls)) == 1
    difference = (top[1] - controls[1, 2]).double().numpy()
    error = difference.std(ddof=1) / 4
    level = 0.95 + 0.05 * 2 / 3  # of three heads
    assert difference.mean() - t.ppf(0.5 + level / 2, 15) * error < 0 < difference.mean()
    assert math.isnan(_count_beyond(top[:, :1], controls[:, :, :1]))


def test_a_module_that_cannot_be_run_again_is_left_out():
    callback = DirectionIntervention()
    callback.observe(next(parts(1)))
    assert callback.measure(next(parts(1))) == {}


def test_without_all_that_it_reads_a_head_attends_alike_to_every_key(suite, tmp_path):
    """Scores are 0 then, so that the weight on the key is one over the number of keys, on either side."""
    source = FolderCheckpoints(str(suite), steps=[8])
    callback = DirectionIntervention(numbers=(2, 16), n_task_heads=1)
    rows = replay(source, tmp_path, callbacks=(callback,), n_prompts=16, batch_size=5).isel(step=0)
    layer, head = divmod(int(rows["directions/layer_head"][0]), 3)
    own = rows["prompt/attention"][layer, head].values
    prompts = ReplayData(source, n_prompts=16).prompts
    expected = np.array([1 / (prompt.query + 1) for prompt in prompts]) - own
    template = np.array([prompt.template for prompt in prompts])
    found = rows["directions/ablated/attention"].values  # [n, side, choice, template]
    for side in range(2):
        for choice in ("top", "spectrum", "rotated", "whole"):  # with all 16 of them, it is the whole space
            values = found[1, side, CHOICES.index(choice)]
            np.testing.assert_allclose(values, expected[np.argsort(template)], atol=2e-5)
    # a pair alone, against the score that the decomposition says it makes: the softmax has less of it
    assert (np.abs(found[0, :, 0]) < np.abs(found[1, :, 0]) + 1e-3).mean() > 0.5


def test_choices_without_a_draw_do_not_depend_on_the_batch_size(suite, tmp_path):
    source = FolderCheckpoints(str(suite), steps=[8])
    rows = [
        replay(source, tmp_path / str(size), callbacks=(DirectionIntervention(),), n_prompts=13, batch_size=size)
        for size in (13, 4)
    ]
    for kind in ("ablated", "boosted", "patched", "alone"):
        for effect in EFFECTS:
            one, other = (row[f"directions/{kind}/{effect}"].isel(step=0).values for row in rows)
            for choice in ("top", "spectrum", "whole"):
                at = CHOICES.index(choice)
                np.testing.assert_allclose(one[..., at, :], other[..., at, :], rtol=1e-3, atol=2e-5)
    assert np.isfinite(rows[0]["directions/patched/attention"].values[0, :2, :, 0]).all()  # swapped and abc


def test_patching_all_that_heads_read_at_the_query_gives_them_the_queries_of_the_other_prompt(suite, tmp_path):
    """By hand: the query vectors of the other prompt in the place of their own."""
    source = FolderCheckpoints(str(suite), steps=[8])
    callback = DirectionIntervention(numbers=(4,), n_task_heads=6)
    rows = replay(source, tmp_path, callbacks=(callback,), n_prompts=7).isel(step=0)
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    expected = {}
    for prompt in ReplayData(source, n_prompts=7).prompts:
        _, other = bridge.run_with_cache(torch.tensor([dict(prompt.counterfactuals)["swapped"]]))
        weights = []

        def patch(q, hook, other=other, at=prompt.query):
            q = q.clone()
            q[0, at] = other[hook.name][0, at]
            return q

        def keep(pattern, hook, prompt=prompt, weights=weights):
            weights.append(pattern[0, :, prompt.query, prompt.key].mean())

        tokens, differences = torch.tensor([prompt.tokens]), []
        for layers in ((), (0, 1)):
            hooks = [(f"blocks.{layer}.attn.hook_q", patch) for layer in layers]
            hooks += [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in (0, 1)]
            of_query = bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, prompt.query]
            differences.append(of_query[prompt.correct] - of_query[prompt.wrong])
        attention = (weights[2] + weights[3] - weights[0] - weights[1]) / 2
        expected[prompt.template] = torch.stack([attention, differences[1] - differences[0]]).detach()
    values = torch.stack([expected[key] for key in sorted(expected)], 1)
    for i, effect in enumerate(("attention", "logit_difference")):
        found = rows[f"directions/patched/{effect}"].values[0, 0, CHOICES.index("whole")]
        np.testing.assert_allclose(found, values[i], rtol=1e-2, atol=1e-6)
    assert values[0].abs().max() > 1e-5


def test_with_one_basis_for_all_offsets_there_are_no_directions_to_move_along(suite, tmp_path):
    """There singular vectors belong to inputs with positions moved into them, which no head reads."""
    model = CheckpointReplay(rope_basis="fixed")
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path, model=model, callbacks=(DirectionIntervention(),))
    assert not [name for name in rows if name.startswith("directions/")]
    assert "sad/sparseness" in rows


def test_checkpoints_that_were_not_asked_for_hold_nan_and_the_last_is_always_measured(suite, tmp_path):
    callback = DirectionIntervention(steps=(2,))
    rows = replay(FolderCheckpoints(str(suite), steps=[2, 4, 8]), tmp_path, callbacks=(callback,))
    for name in (*(f"directions/{kind}/divergence" for kind in ("ablated", "alone")), "directions/key/attention"):
        assert np.isnan(rows[name].sel(step=4)).all()
        for step in (2, 8):
            assert np.isfinite(rows[name].sel(step=step)).any()
    assert np.isnan(rows["directions/query/heads_beyond_controls"].sel(step=4))


@pytest.mark.parametrize(
    "options", [{"numbers": ()}, {"numbers": (0,)}, {"numbers": (2, 2)}, {"n_task_heads": 0}], ids=str
)
def test_an_option_out_of_range_is_an_input_error(options):
    with pytest.raises(InputError, match=next(iter(options))):
        DirectionIntervention(**options)


def test_its_options_are_its_arguments():
    assert DirectionIntervention().options() == {"numbers": (1, 4), "n_task_heads": 3, "seed": 0, "steps": None}
