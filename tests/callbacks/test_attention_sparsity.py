import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import train

from svf_lightning.callbacks import AttentionSparsity, Capture, TrajectoryWriter
from svf_lightning.callbacks.causal_ablation import CausalAblation, chosen
from svf_lightning.errors import InputError
from svf_lightning.heads import AttentionHeads
from svf_lightning.metrics import n_recon, relative_attention, sparseness
from svf_lightning.probe import AttendedScores, Outcome, Probe
from svf_lightning.toy import ToyAttentionModel, ToyData
from svf_lightning.trajectory import open_trajectory

# ---- in the toy model


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


@pytest.mark.parametrize("options", [{"rope": True, "d_model": 8}, {"template": "zero"}])
def test_attended_pairs_need_a_head_without_rotary_positions(options):
    with pytest.raises(InputError, match="n_attended"):
        ToyAttentionModel(n_attended=4, **options)


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
    torch.testing.assert_close(found["prompt/sparseness"].values[0], sparseness(relative).float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["sad/score"][0], relative.sum(-1).mean(-1).float(), rtol=1e-3, atol=1e-4)


def parts(n_parts: int, R: int = 6):
    """Probes that show different pairs of one step, with attention and outcomes."""
    g = torch.Generator().manual_seed(1)
    for i in range(n_parts):
        tensors = {name: torch.randn(2, 3, 5, R, generator=g) for name in ("query", "key", "direction")}
        scores = AttendedScores(
            **tensors, S=torch.rand(2, 3, 5, R, generator=g), attention=torch.rand(2, 3, 5, generator=g),
            logit_difference=torch.randn(5, generator=g),
        )  # fmt: skip
        yield Probe(4, scores=scores, part=(i, n_parts), batch_dims=("layer", "head"), feature_dims=())


def test_task_heads_are_those_with_most_attention_and_statistics_are_theirs():
    callback = AttentionSparsity(n_draws=2, n_task_heads=2, attending=0.6)
    shown = list(parts(3))
    for probe in shown:
        callback.observe(probe)
    found = callback.measure(Probe.stack(shown[:1]))
    attention = torch.cat([p.scores.attention for p in shown], -1).flatten(0, 1)
    contributions = torch.cat([p.scores.contributions for p in shown], -2).flatten(0, 1)
    task = attention.mean(-1).topk(2).indices
    assert found["task/layer_head"].values[0].tolist() == task.tolist()
    assert float(found["sad/task/sparseness"]) == pytest.approx(float(sparseness(contributions[task]).mean()))
    attends = attention >= 0.6
    assert float(found["sad/attending/count"]) == int(attends.sum())
    expected = n_recon(contributions[attends]).double().quantile(0.5)
    assert float(found["sad/attending/n_recon"]) == pytest.approx(float(expected))
    differences = torch.cat([p.scores.logit_difference for p in shown])
    assert float(found["sad/accuracy"]) == pytest.approx(float((differences > 0).float().mean()))
    assert callback.measure(Probe(4, batch_dims=("layer", "head"))) == {}  # the next step begins with nothing


@pytest.mark.parametrize("options", [{"n_draws": 0}, {"n_task_heads": 0}, {"attending": 1.0}])
def test_options_out_of_range_are_input_errors(options):
    with pytest.raises(InputError):
        AttentionSparsity(**options)


# ---- causal ablation


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
    assert found["causal/layer_head"].values.tolist() == [[head]]
    assert all((call.flatten(0, 1)[torch.arange(6) != head] == 0).all() for call in calls)
    own = torch.cat([p.scores.contributions for p in shown], -2).flatten(0, 1)[head]
    towards = own * own.sum(-1, keepdim=True).sign()
    top = own.gather(-1, towards.topk(2).indices).sum(-1)
    values = found["causal/logit_difference"].values[0]
    torch.testing.assert_close(values[1, 0], -top)
    torch.testing.assert_close(values[0, 2], -own[:, 0])
    torch.testing.assert_close(found["causal/attention"].values[0, 1, 0], -top.abs())
    paired = values[1, 0] - values[1, 1]
    half = 1.96 * paired.std() / 10**0.5
    assert float(found["causal/top_vs_random/logit_difference_high/2"].values) == pytest.approx(
        float(paired.mean() + half)
    )


def test_a_module_that_cannot_be_run_again_is_left_out():
    callback = CausalAblation()
    callback.observe(next(parts(1)))
    assert callback.measure(next(parts(1))) == {}
