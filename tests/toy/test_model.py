import numpy as np
import pytest
import torch
from helpers.training import SMALL, train

from svf_lightning.errors import InputError
from svf_lightning.toy import ToyAttentionModel, ToyData

I, N, D, H, B, m = 3, 11, 7, 5, 13, 4  # noqa: E741


def small(**options):
    return ToyAttentionModel(**{"n_features": N, "d_model": D, "d_head": H, "n_instances": I, **options})


def draw(n_instances=I, **options):
    return ToyData(n_features=N, n_instances=n_instances, batch_size=B, context_length=m, **options).draw(0)


def losses_by_hand(model, f, lambda_attn, importance):
    """The formulas of method.md, section 1, written with loops over sequences and keys."""
    W, b, W_Q, W_K = (p.detach().double().numpy() for p in (model.W, model.b, model.W_Q, model.W_K))
    T = model.template.matrix().double().numpy()
    f = np.broadcast_to(f.double().numpy(), (I, B, 1 + m, N))
    recon, attn = np.zeros(I), np.zeros(I)
    for i in range(I):
        omega = W_Q[i].T @ W_K[i]
        for s in range(B):
            tokens = [W[i] @ f[i, s, t] for t in range(1 + m)]
            for t, x in enumerate(tokens):
                out = np.maximum(W[i].T @ x + b[i], 0)
                recon[i] += (importance[i] * (f[i, s, t] - out) ** 2).sum() / (B * (1 + m))
            logits = np.array([tokens[0] @ omega @ x for x in tokens[1:]])
            target = np.array([f[i, s, 0] @ T[i] @ f[i, s, t] for t in range(1, 1 + m)])
            p = np.exp(target) / np.exp(target).sum()
            attn[i] += -(p * (logits - np.log(np.exp(logits).sum()))).sum() / B
    return recon, attn, recon + lambda_attn * attn


@pytest.mark.parametrize("streams", ["shared", "separate"])
def test_losses_are_those_of_the_formulas(streams):
    lambdas, decay = [0.5, 2.0, 10.0], [1.0, 0.9, 0.5]
    model = small(template="linear", n_pairs=3, target_logit=[2.0, 4.0, 6.0], lambda_attn=lambdas, importance=decay)
    with torch.no_grad():
        model.b.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        model.W.mul_(10)
    f = draw(feature_probability=0.5, streams=streams)
    found = model.losses(f)
    importance = np.array([[r**k for k in range(N)] for r in decay])
    for name, expected in zip(
        ("recon", "attn", "total"), losses_by_hand(model, f, np.array(lambdas), importance), strict=True
    ):
        np.testing.assert_allclose(found[f"loss/{name}"].detach(), expected, rtol=2e-5)


def test_the_divergence_is_the_attention_loss_without_the_entropy_of_its_target():
    model = small(template="linear", n_pairs=3, target_logit=[2.0, 4.0, 6.0])
    f = draw(feature_probability=0.5, streams="separate")
    found = model.losses(f)
    target, logits = model.target_logits(f).double(), model(f)[1].detach().double()
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(found["loss/kl"].double(), kl.sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
    assert (found["loss/kl"] < found["loss/attn"]).all()
    with torch.no_grad():  # the head that gives every logit its target
        X = torch.eye(N, dtype=torch.float32)
        exact = ToyAttentionModel(
            n_features=N, d_model=N, d_head=N, n_instances=1, template="single", init_head="optimal"
        )
        exact.W.copy_(X)
        T = exact.template.matrix()
        exact.W_Q.copy_(torch.eye(N))
        exact.W_K.copy_(T)
    assert exact.losses(draw(n_instances=1))["loss/kl"].item() == pytest.approx(0, abs=1e-6)


def test_weights_per_feature_equal_the_decay_that_gives_them():
    rows = [[0.9**k for k in range(N)]]
    f = draw()
    torch.testing.assert_close(small(importance=rows).losses(f), small(importance=0.9).losses(f))


def test_without_a_template_there_is_no_head_and_no_attention_loss():
    model = small(template="zero")
    assert not hasattr(model, "W_Q")
    assert set(model.losses(draw())) == {"loss/recon", "loss/total"}
    assert model.probe().heads is None


def test_the_probe_shows_the_weights_that_the_loss_uses():
    model = small()
    probe = model.probe()
    f = draw()
    tokens = torch.einsum("idn,ibtn->ibtd", probe.features, f.expand(I, -1, -1, -1))
    omega = probe.heads.W_Q.mT @ probe.heads.W_K
    logits = torch.einsum("ibd,ide,ibje->ibj", tokens[:, :, 0], omega, tokens[:, :, 1:])
    torch.testing.assert_close(model(f)[1], logits)


def test_instances_do_not_see_each_other():
    """The gradient of one instance's loss reaches that instance's weights alone."""
    model = small()
    model.losses(draw())["loss/total"][1].backward()
    for parameter in model.parameters():
        assert parameter.grad[1].any() or parameter is model.b
        assert not parameter.grad[[0, 2]].any()


@pytest.mark.parametrize("streams", ["shared", "separate"])
def test_an_instance_alone_and_in_a_cohort_of_8_agree(tmp_path, streams):
    lambdas = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    probabilities = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    together = train(
        tmp_path,
        steps=60,
        model={"n_instances": 8, "lambda_attn": lambdas, "seed": 3},
        data={"seed": 3, "feature_probability": probabilities, "streams": streams},
    )
    for i in (0, 5):
        alone = train(
            tmp_path,
            steps=60,
            model={"n_instances": 1, "lambda_attn": lambdas[i], "seed": 3 + i},
            data={
                "seed": 3 + (i if streams == "separate" else 0),
                "feature_probability": probabilities[i],
                "streams": streams,
            },
        )
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(value[0], together.state_dict()[name][i], rtol=1e-4, atol=1e-5)


def test_an_instance_that_diverges_leaves_the_others_as_they_are(tmp_path):
    lambdas = [1.0, 1e38, 1.0]
    well = train(tmp_path, model={"lambda_attn": 1.0}, trainer={"gradient_clip_val": 1.0})
    ill = train(tmp_path, model={"lambda_attn": lambdas}, trainer={"gradient_clip_val": 1.0})
    for name, value in well.state_dict().items():
        torch.testing.assert_close(value[[0, 2]], ill.state_dict()[name][[0, 2]], rtol=0, atol=0)


def test_two_runs_with_one_seed_give_bit_identical_weights(tmp_path):
    a, b = (train(tmp_path, steps=40, model={"seed": 9}, data={"seed": 9}).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    c = train(tmp_path, steps=40, model={"seed": 10}, data={"seed": 9}).state_dict()
    assert not torch.equal(a["W"], c["W"])


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("cosine", 0.5), ("linear", 0.5)])
def test_learning_rate_schedules_end_where_they_say(tmp_path, schedule, half):
    import lightning.pytorch as pl

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(tmp_path, steps=20, callbacks=[Watch()], model={"learning_rate": 0.01, "lr_schedule": schedule})
    assert seen[0] == pytest.approx(0.01)
    assert seen[10] == pytest.approx(0.01 * half)
    assert seen[-1] < 0.01 or schedule == "constant"


def test_adamw_decays_weights_and_adam_does_not(tmp_path):
    plain, adamw, decayed = (
        train(tmp_path, model={"optimizer": o, "weight_decay": w, "learning_rate": 0.01}).state_dict()["W"]
        for o, w in (("adam", 0.0), ("adamw", 0.0), ("adamw", 1.0))
    )
    torch.testing.assert_close(plain, adamw)
    assert decayed.norm() < adamw.norm()


@pytest.mark.parametrize(("options", "most"), [
    ({"template": "many_to_one", "n_pairs": 4}, 1), ({"template": "linear", "n_pairs": 4, "d_head": 2}, 2),
    ({"template": "linear", "n_pairs": 3}, None), ({"template": "single"}, None),
])  # fmt: skip
def test_a_template_whose_pairs_cannot_have_a_singular_pair_each_gets_a_line(tmp_path, capsys, options, most):
    train(tmp_path, steps=1, callbacks=[], model=options)
    said = [line for line in capsys.readouterr().err.splitlines() if "target pairs" in line]
    assert len(said) == (most is not None)
    assert most is None or f"no more than {most} singular pairs" in said[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 0}, "n_features=0"),
        ({"d_model": 0}, "d_model=0"),
        ({"d_head": 0}, "d_head=0"),
        ({"n_instances": 0}, "n_instances=0"),
        ({"lambda_attn": -1.0}, "lambda_attn=-1.0"),
        ({"lambda_attn": [1.0, 2.0]}, "2 values for 3 instances.*n_instances=2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"weight_decay": 0.1}, "optimizer=adamw"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"lr_schedule": "step"}, "lr_schedule='step'"),
        ({"importance": [[1.0, 2.0]]}, "importance has 1 rows of"),
        ({"seed": [1, 2]}, "2 seeds for 3 instances"),
        ({"init_head_scale": 0.0}, "init_head_scale=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_fix(options, message):
    with pytest.raises(InputError, match=message):
        ToyAttentionModel(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainer": {"accumulate_grad_batches": 2}}, "accumulate_grad_batches=2.*batch_size"),
        ({"data": {"context_length": 0}}, "context_length=0"),
        ({"data": {"context_length": 1}}, "context_length=1.*at least 2 with a head"),
    ],
)
def test_a_trainer_or_data_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path, **options)
