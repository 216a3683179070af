"""AttentionSparsity against dense decompositions: in the toy model, in a module of a user, and over prompts."""

from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.probes import parts
from helpers.replays import replay
from helpers.training import train
from scipy.stats import false_discovery_control, permutation_test

from svf_lightning.callbacks import AttentionSparsity, Capture, TrajectoryWriter
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import n_recon, relative_attention, sparseness
from svf_lightning.probe import Probe
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.toy import ToyData
from svf_lightning.trajectory import open_trajectory

# ---- in the toy model


def test_sparseness_in_training_equals_a_dense_computation_from_the_stored_weights(tmp_path):
    callbacks = [Capture(chunk=4), AttentionSparsity(n_draws=2), TrajectoryWriter()]
    model = train(
        tmp_path, steps=6, callbacks=callbacks, model={"n_attended": 9, "d_head": 3}, data={"feature_probability": 0.3}
    )
    rows = open_trajectory(tmp_path)
    assert rows["step"].values.tolist() == list(range(7))
    queries, keys = ToyData(
        n_features=model.n_features, n_instances=3, batch_size=16, context_length=5, feature_probability=0.3
    ).attended(model.pairs, 9)
    W, W_Q, W_K = (p.detach().double() for p in (model.W, model.W_Q, model.W_K))
    for instance in range(3):
        U, S, Vt = torch.linalg.svd(W_Q[instance].T @ W_K[instance])
        r, s = (f[0].double() @ W[instance].T for f in (queries, keys))
        contributions = (r @ U) * S * (s @ Vt.T)
        kept = contributions[:, :3]  # rank d_head
        at = {"step": -1, "instance": instance}
        np.testing.assert_allclose(rows["prompt/sparseness"].isel(at), sparseness(kept), rtol=1e-3)
        np.testing.assert_allclose(rows["prompt/score"].isel(at), contributions.sum(-1), rtol=1e-3, atol=1e-6)
        assert float(rows["sad/sparseness"].isel(at)) == pytest.approx(float(sparseness(kept).mean()), rel=1e-3)
        share = (n_recon(kept) <= 4).float().mean()
        assert float(rows["sad/n_recon_at_most_4"].isel(at)) == pytest.approx(float(share))


def test_every_nth_step_and_the_last_one_are_measured_and_the_others_say_nothing(tmp_path):
    options = {"model": {"n_attended": 9}, "data": {"feature_probability": 0.3}, "steps": 8}
    for name, every in (("all", 1), ("some", 3)):
        callbacks = [Capture(chunk=100), AttentionSparsity(n_draws=2, every_n_steps=every), TrajectoryWriter()]
        train(tmp_path / name, callbacks=callbacks, **options)
    every, some = (open_trajectory(tmp_path / name) for name in ("all", "some"))
    measured = np.isfinite(some["sad/sparseness"].values).all(1)
    assert {0, 3, 6, 8} <= set(some["step"].values[measured])
    assert not measured[[1, 2]].any()
    for name in ("sad/sparseness", "sad/sparseness_shared_rotation", "prompt/score"):
        np.testing.assert_allclose(some[name][measured], every[name][measured], rtol=1e-4, atol=1e-6)
    assert (some["prompt/n_recon"][~measured] == -1).all()


def test_watching_the_sparseness_does_not_change_the_training(tmp_path):
    plain = train(tmp_path / "a", steps=5, callbacks=[], data={"feature_probability": 0.3})
    watched = train(
        tmp_path / "b", steps=5, callbacks=[AttentionSparsity()], model={"n_attended": 8},
        data={"feature_probability": 0.3},
    )  # fmt: skip
    assert torch.equal(plain.W, watched.W)
    assert torch.equal(plain.W_Q, watched.W_Q)


# ---- in a module of a user's own


class Own(pl.LightningModule):
    """Two layers of three heads with biases, and pairs that its probe shows in the residual stream."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.heads = AttentionHeads(
            *(torch.randn(2, 3, 5, 13, generator=g) for _ in range(2)),
            *(torch.randn(2, 3, 5, generator=g) for _ in range(2)),
        )
        self.tokens = torch.randn(7, 4, 13, generator=g)

    def probe(self):
        query, keys = self.tokens[:, 0], self.tokens[:, 1:]
        relative = keys[:, 0] - keys[:, 1:].mean(1)
        return Probe(
            3, self.heads, attended_queries=query, attended_keys=relative, batch_dims=("layer", "head"), feature_dims=()
        )


def test_any_module_with_attended_pairs_in_its_probe_is_measured():
    module = Own()
    found = AttentionSparsity(n_draws=2).measure(Probe.stack([module.probe()]))
    ones = torch.ones(7, 4, 1)
    tokens = torch.cat([module.tokens, ones], -1).double()
    W_Q, W_K = (w.double() for w in module.heads.factors())
    U, S, V = AttentionHeads(W_Q, W_K).svd()
    a = tokens[:, 0] @ U  # [layer, head, n, R]
    c = a[..., None, :] * S[..., None, None, :] * torch.einsum("nmd,lhdr->lhnmr", tokens[:, 1:], V)
    relative = relative_attention(c)[..., 0, :]
    torch.testing.assert_close(found["prompt/sparseness"][0], sparseness(relative).float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["sad/score"][0], relative.sum(-1).mean(-1).float(), rtol=1e-3, atol=1e-4)


# ---- over the prompts of a step, which come in parts


def test_task_heads_are_those_with_most_attention_and_statistics_are_theirs():
    callback = AttentionSparsity(n_draws=2, n_task_heads=2, attending=0.6)
    shown = list(parts(3))
    for probe in shown:
        callback.observe(probe)
    found = callback.measure(Probe.stack(shown[:1]))
    attention = torch.cat([p.scores.attention for p in shown], -1).flatten(0, 1)
    contributions = torch.cat([p.scores.contributions for p in shown], -2).flatten(0, 1)
    task = attention.mean(-1).topk(2).indices
    assert found["task/layer_head"][0].tolist() == task.tolist()
    assert float(found["sad/task/sparseness"]) == pytest.approx(float(sparseness(contributions[task]).mean()))
    attends = attention >= 0.6
    assert float(found["sad/attending/count"]) == int(attends.sum())
    expected = n_recon(contributions[attends]).double().quantile(0.5)
    assert float(found["sad/attending/n_recon"]) == pytest.approx(float(expected))
    differences = torch.cat([p.scores.logit_difference for p in shown])
    assert float(found["sad/accuracy"]) == pytest.approx(float((differences > 0).float().mean()))
    assert callback.measure(Probe(4, batch_dims=("layer", "head"))) == {}  # the next step begins with nothing


def test_what_intervals_are_made_of_adds_up_to_what_is_shown():
    callback = AttentionSparsity(n_draws=2, n_task_heads=2, attending=0.6)
    shown = list(parts(3))
    n = sum(probe.scores.attention.shape[-1] for probe in shown)
    templates = torch.tensor([i % 4 if i % 5 else -1 for i in range(n)])  # every fifth prompt is its own
    for probe in shown:
        callback.observe(probe)
    probe = replace(Probe.stack(shown[:1]), coords={"prompt_template": (("prompt",), templates)})
    found = {name: value[0] for name, value in callback.measure(probe).items()}
    counts = found["attending/count"]
    assert counts.shape == (2, 3)
    assert counts.sum() == found["sad/attending/count"]
    for name in ("sparseness", "sparseness_shared_rotation", "sparseness_permuted_pairing"):
        of_heads = found[f"attending/{name}"]
        assert of_heads.isnan().equal(counts == 0)
        mean = (of_heads.nan_to_num() * counts).sum() / counts.sum()
        torch.testing.assert_close(mean, found[f"sad/attending/{name}"])
        of_templates = found[f"template/{name}"]
        alone = templates < 0
        sizes = torch.tensor([*((templates == t).sum() for t in range(4)), *[1] * int(alone.sum())])
        torch.testing.assert_close((of_templates * sizes).sum() / n, found[f"sad/task/{name}"])
    differences = torch.cat([p.scores.logit_difference for p in shown])
    torch.testing.assert_close(found["template/accuracy"][2], (differences[templates == 2] > 0).float().mean())
    controls = ("shared_rotation", "independent_rotation", "permuted_pairing")
    strongest = torch.stack([found[f"sad/sparseness_{name}"] for name in controls]).amin(0)
    torch.testing.assert_close(found["sad/sparseness_strongest_control"], strongest)


def test_prompts_without_templates_are_a_template_each():
    callback = AttentionSparsity(n_draws=2)
    shown = list(parts(2))
    for probe in shown:
        callback.observe(probe)
    found = callback.measure(Probe.stack(shown[:1]))
    assert found["template/accuracy"].shape == (1, sum(p.scores.attention.shape[-1] for p in shown))


def test_values_of_single_pairs_are_kept_unless_told_otherwise():
    found = []
    for keep in (True, False):
        callback = AttentionSparsity(n_draws=2, keep_prompts=keep)
        shown = list(parts(2))
        for probe in shown:
            callback.observe(probe)
        found.append(callback.measure(Probe.stack(shown[:1])))
    kept, not_kept = found
    assert all(name.startswith(("prompt/", "draw/", "contribution/")) for name in set(kept) - set(not_kept))
    assert {"prompt/sparseness", "draw/shared", "contribution/mean"} <= set(kept) - set(not_kept)
    assert kept["prompt/sparseness"].shape == (1, 2, 3, 10)
    assert all(torch.equal(value, kept[name]) for name, value in not_kept.items())


def test_without_query_key_pairs_there_is_nothing():
    callback = AttentionSparsity()
    callback.observe(Probe(0))
    assert callback.measure(Probe.stack([Probe(0)])) == {}


@pytest.mark.parametrize(
    "options",
    [
        {"n_draws": 0},
        {"n_task_heads": 0},
        {"attending": 1.0},
        {"every_n_steps": 0},
        {"recon_share": 0},
        {"scores": "softmax"},
    ],
    ids=str,
)
def test_options_out_of_range_are_input_errors(options):
    with pytest.raises(InputError, match=next(iter(options))):
        AttentionSparsity(**options)


def test_its_options_are_its_arguments():
    assert AttentionSparsity().options() == {
        "n_draws": 16, "seed": 0, "n_task_heads": 3, "attending": 0.5, "keep_prompts": True, "every_n_steps": 1,
    }  # fmt: skip
    given = {"n_draws": 4, "seed": 1, "n_task_heads": 2, "attending": 0.25, "keep_prompts": False, "every_n_steps": 9}
    assert AttentionSparsity(**given).options() == given


def test_options_that_came_later_are_told_where_they_are_used_so_that_earlier_runs_go_on():
    assert not {"recon_share", "scores"} & AttentionSparsity().options().keys()
    options = AttentionSparsity(recon_share=0.7, scores="raw").options()
    assert (options["recon_share"], options["scores"]) == (0.7, "raw")


@pytest.mark.parametrize(("scores", "share"), [("relative", 0.7), ("raw", 1.0), ("raw", 0.7)])
def test_scores_are_relative_or_raw_and_reached_as_far_as_asked_for(scores, share):
    shown = []
    for i, probe in enumerate(parts(2)):
        g = torch.Generator().manual_seed(i)
        raw = {f"raw_{name}": torch.randn(2, 3, 5, 6, generator=g) for name in ("key", "direction")}
        shown.append(replace(probe, scores=replace(probe.scores, **raw)))
    callback = AttentionSparsity(n_draws=2, scores=scores, recon_share=share)
    for probe in shown:
        callback.observe(probe)
    found = callback.measure(Probe.stack(shown[:1]))
    of_query, of_key = (
        torch.cat([getattr(p.scores, name) for p in shown], -2)
        for name in ("query", {"raw": "raw_key"}.get(scores, "key"))
    )
    contributions = of_query * of_key
    torch.testing.assert_close(found["prompt/score"][0], contributions.sum(-1))
    torch.testing.assert_close(found["prompt/sparseness"][0], sparseness(contributions))
    assert torch.equal(found["prompt/n_recon"][0].long(), n_recon(contributions, share))
    few = found["prompt/n_recon_at_most_4_rotated"][0]
    assert set(few.flatten().tolist()) <= {0, 0.5, 1}  # a share of two draws
    torch.testing.assert_close(found["sad/n_recon_at_most_4_rotated"][0], few.nanmean(-1))


def test_each_head_is_tested_against_every_control_over_templates_and_corrected_over_heads(suite, tmp_path):
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path, n_prompts=48, batch_size=20).isel(step=-1)
    index = np.unique(rows.prompt_template.values, return_inverse=True)[1]
    assert len(np.unique(index)) == 16

    def of_templates(name):
        values = rows[f"prompt/{name}"].values.astype(float).reshape(6, 48)
        return np.stack([values[:, index == k].mean(1) for k in range(16)], axis=1)

    own = of_templates("sparseness")
    kinds = ("shared_rotation", "independent_rotation", "permuted_pairing")
    controls = np.stack([of_templates(f"sparseness_{kind}") for kind in kinds])

    def p_of(differences):
        test = permutation_test(
            (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True,
            n_resamples=np.inf, alternative="greater", axis=-1,
        )  # fmt: skip
        return test.pvalue

    expected = {
        "sparser": false_discovery_control(p_of(controls - own).max(0)),
        "denser": false_discovery_control(np.minimum(1, 3 * p_of(own - controls).min(0))),
    }
    for way, p in expected.items():
        np.testing.assert_allclose(rows[f"sad/p_{way}"].values.ravel(), p, rtol=1e-3)
        np.testing.assert_array_equal(rows[f"sad/{way}"].values.ravel(), p <= 0.05)
    assert rows["sad/sparser"].dims == ("layer", "head")
    assert np.isfinite(rows["sad/denser"]).all()


def test_of_few_templates_no_head_is_tested(suite, tmp_path):
    rows = replay(FolderCheckpoints(str(suite), steps=[8]), tmp_path, n_prompts=4)
    assert len(np.unique(rows.prompt_template)) == 4
    for name in ("sad/sparser", "sad/denser", "sad/p_sparser"):
        assert np.isnan(rows[name]).all()
