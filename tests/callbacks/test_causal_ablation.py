"""CausalAblation: which contributions are taken off which heads, and what the model does then."""

import numpy as np
import pytest
import torch
from helpers.probes import parts
from helpers.replays import replay
from transformers import AutoModelForCausalLM

from svf_lightning.callbacks.causal_ablation import CausalAblation, chosen
from svf_lightning.errors import InputError
from svf_lightning.probe import Outcome, Probe
from svf_lightning.replay import FolderCheckpoints, ReplayData
from svf_lightning.replay.bridge import make_bridge


def test_chosen_contributions_are_the_top_random_others_or_the_first():
    v = torch.tensor([[0.5, -4.0, 3.0, 1.0, 2.0, 0.1], [-0.5, 4.0, -3.0, -1.0, -2.0, -0.1]])
    generator = torch.Generator().manual_seed(0)
    assert chosen(v, 2, "top", generator).tolist() == [[2, 4], [2, 4]]
    assert chosen(v, 3, "spectrum", generator).tolist() == [[0, 1, 2], [0, 1, 2]]
    draws = torch.stack([chosen(v, 2, "random", generator) for _ in range(200)])
    assert set(draws[:, 0].flatten().tolist()) == {0, 1, 3, 5}  # others than the top ones, all of them at times
    assert (draws[..., 0] != draws[..., 1]).all()


def test_ablation_takes_the_chosen_contributions_off_the_task_heads_alone():
    shown, calls = [], []
    for probe in parts(2):
        scores = probe.scores

        def intervene(removed, scores=scores):
            calls.append(removed)
            return Outcome(scores.attention - removed.abs(), scores.logit_difference - removed.sum((0, 1)))

        shown.append(Probe(4, scores=scores, part=probe.part, intervene=intervene, batch_dims=("layer", "head")))
    callback = CausalAblation(n_removed=2, report=(1, 2), n_task_heads=1)
    for probe in shown:
        callback.observe(probe)
    found = callback.measure(shown[0])
    attention = torch.cat([p.scores.attention for p in shown], -1).flatten(0, 1)
    head = int(attention.mean(-1).argmax())
    assert found["causal/layer_head"].tolist() == [[head]]
    assert all((call.flatten(0, 1)[torch.arange(6) != head] == 0).all() for call in calls)
    own = torch.cat([p.scores.contributions for p in shown], -2).flatten(0, 1)[head]
    towards = own * own.sum(-1, keepdim=True).sign()
    top = own.gather(-1, towards.topk(2).indices).sum(-1)
    values = found["causal/logit_difference"][0]
    torch.testing.assert_close(values[1, 0], -top)
    torch.testing.assert_close(values[0, 2], -own[:, 0])
    torch.testing.assert_close(found["causal/attention"][0, 1, 0], -top.abs())
    paired = values[1, 0] - values[1, 1]
    half = 1.96 * paired.std() / 10**0.5
    assert float(found["causal/top_vs_random/logit_difference_high/2"]) == pytest.approx(float(paired.mean() + half))


def test_a_module_that_cannot_be_run_again_is_left_out():
    callback = CausalAblation()
    callback.observe(next(parts(1)))
    assert callback.measure(next(parts(1))) == {}


def test_removing_contributions_from_every_head_changes_what_the_model_does(suite, tmp_path):
    """Independent of the callback: all contributions of a head removed = its relative score set to 0 by hand."""
    bridge = make_bridge(AutoModelForCausalLM.from_pretrained(suite / "step8").eval())
    source = FolderCheckpoints(str(suite), steps=[8])
    ablation = CausalAblation(n_removed=16, report=(1, 16), n_task_heads=1)
    rows = replay(source, tmp_path, callbacks=(ablation,), n_prompts=7).isel(step=0)
    layer, head = divmod(int(rows["causal/layer_head"][0]), 3)
    prompts = ReplayData(source, n_prompts=7).prompts
    assert (layer, head) == np.unravel_index(rows["prompt/attention"].mean("prompt").argmax(), (2, 3))
    for i, prompt in enumerate(prompts):
        off = float(rows["prompt/score"][layer, head, i])

        def change(scores, hook, prompt=prompt, off=off):
            scores = scores.clone()
            scores[0, head, prompt.query, prompt.key] -= off
            return scores

        logits = bridge.run_with_hooks(
            torch.tensor([prompt.tokens]), fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", change)]
        )[0, prompt.query]
        expected = float(logits[prompt.correct] - logits[prompt.wrong]) - float(rows["prompt/logit_difference"][i])
        for kind in (0, 2):  # with all of them removed, it does not matter in which order
            found = float(rows["causal/logit_difference"][15, kind, i])
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("options", [{"n_removed": 0}, {"n_task_heads": 0}, {"report": (9,)}], ids=str)
def test_an_option_out_of_range_is_an_input_error(options):
    with pytest.raises(InputError, match=next(iter(options))):
        CausalAblation(**options)


def test_numbers_are_declared_for_what_is_reported_alone():
    names = {quantity.name for quantity in CausalAblation(n_removed=3, report=(1, 3, 8)).quantities}
    assert {"causal/top/attention/1", "causal/random/logit_difference/3", "causal/attention"} <= names
    assert not any(name.endswith(("/2", "/8")) for name in names)


def test_its_options_are_its_arguments():
    assert CausalAblation().options() == {"n_removed": 8, "report": (1, 2, 4, 8), "n_task_heads": 3, "seed": 0}
    given = {"n_removed": 4, "report": (1, 2, 4, 8), "n_task_heads": 1, "seed": 5}
    assert CausalAblation(**given).options() == given
