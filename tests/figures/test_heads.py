"""How several heads share the pairs, and the head at every offset of rotary positions."""

import numpy as np
import pytest
from figures.datasets import N_I, OFFSETS, last, named, rotary, several_heads, traces

from svf_lightning.figures import by_offset, head_shares


def test_head_shares_at_the_last_step_and_alignment_over_time():
    run = several_heads()
    figure = head_shares(run, instance=1)
    (heat,) = traces(figure, "heatmap")
    np.testing.assert_allclose(heat.z, last(run, "head/share", instance=1), rtol=1e-6)
    np.testing.assert_allclose(np.sum(heat.z, axis=0), 1)
    assert heat.text[2][1] == "head 2, pair 2 → 0<br>share "
    assert figure.layout.xaxis.ticktext == ("4 → 9", "2 → 0")
    assert figure.layout.yaxis.ticktext == tuple("0123")
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # the first head on top
    mean = last(run, "heads/participation").mean()
    assert f"{mean:.3g} of 4" in figure.layout.title.text
    for name, text in (("heads/best", "best head"), ("heads/combined", "sum of the heads")):
        np.testing.assert_allclose(named(figure, text).y, run[name].values.mean(1))
        np.testing.assert_array_equal(named(figure, text).x, run["step"])
        np.testing.assert_array_equal(named(figure, f"{text}, instance 2").y, run[name].values[:, 2])
        assert named(figure, text).xaxis == "x2"


def test_by_offset_has_the_last_value_of_every_instance_at_its_offset():
    run = rotary()
    figure = by_offset(run)
    strongest = int(run["target_logit"].values.mean(0).argmax())
    for text, name, axis, at in (
        ("alignment", "alignment/matched", "x", {}),
        ("\u03c3<sub>1</sub>", "spectrum/sigma_1", "x2", {}),
        ("logit of the strongest pair", "pair/logit", "x2", {"pair": strongest}),
    ):
        values = last(run, name, **at)
        dots, mean = [t for t in figure.data if t.name == text]
        assert {dots.xaxis, mean.xaxis} == {axis}
        np.testing.assert_array_equal(dots.y, values.ravel())
        np.testing.assert_allclose(dots.x, OFFSETS * N_I, atol=0.2)
        np.testing.assert_array_equal([offset for _, offset in dots.customdata], OFFSETS * N_I)
        np.testing.assert_allclose(mean.y, values.mean(0))
        np.testing.assert_array_equal(mean.x, OFFSETS)
    np.testing.assert_array_equal(figure.layout.xaxis.tickvals, OFFSETS)


def test_by_offset_draws_the_target_where_it_is_known():
    run = rotary()
    target = run["target_logit"].values.mean(0)
    at_first = named(by_offset(run), "target of the strongest pair at offset 1")
    assert list(at_first.x) == [1]
    np.testing.assert_allclose(at_first.y, [target.max()])
    decay = np.exp(1 - run["offset"])
    for dims in (("instance", "offset", "pair"), ("offset", "pair", "instance")):
        decayed = run.assign_coords(target_logit=(run["target_logit"] * decay).transpose(*dims))
        curve = named(by_offset(decayed), "target of the strongest pair")
        np.testing.assert_array_equal(curve.x, OFFSETS)
        np.testing.assert_allclose(curve.y, target.max() * decay)
    alone = by_offset(run.isel(pair=[0]))
    assert named(alone, "target of the pair at offset 1").y[0] == pytest.approx(target[0])
    without = by_offset(run.drop_vars(["target_logit", "pair/logit"]))
    assert {t.name for t in without.data} == {"alignment", "\u03c3<sub>1</sub>"}


def test_by_offset_leaves_out_an_instance_that_diverged():
    run = rotary()
    sigma = run["spectrum/sigma_1"].copy()
    sigma[:, 1] = np.nan
    mean = [t for t in by_offset(run.assign({"spectrum/sigma_1": sigma})).data if t.xaxis == "x2"][1]
    np.testing.assert_allclose(mean.y, sigma.values[-1, [0, 2]].mean(0))
