"""The numbers of a row do not depend on which rows are measured with it, so a run may stop and go on anywhere.

Up to rounding: matrix products add in an order that depends on where a matrix lies in memory.
"""

import pytest
import torch

from svf_lightning.callbacks import FeatureOrthogonality, SVDAlignment, TheoryGap
from svf_lightning.callbacks.base import Measured
from svf_lightning.probe import Probe
from svf_lightning.toy import ToyAttentionModel

METRICS = (SVDAlignment, FeatureOrthogonality, TheoryGap)
SIZES = {
    "single pair": {"n_features": 20, "d_model": 10, "n_instances": 3},
    "many pairs": {"n_features": 51, "d_model": 25, "d_head": 7, "n_pairs": 5, "n_instances": 2},
}


@pytest.fixture(scope="module", params=SIZES)
def probes(request):
    """Of a model whose weights change a little between the steps."""
    torch.manual_seed(0)
    model = ToyAttentionModel(**SIZES[request.param])
    made = []
    for _ in range(17):
        with torch.no_grad():
            for weights in model.parameters():
                weights += 0.01 * torch.randn_like(weights)
        made.append(model.probe().snapshot())
    return made


def values(measurement):
    return {name: value.values if isinstance(value, Measured) else value for name, value in measurement.items()}


@pytest.mark.parametrize("metric", METRICS)
@torch.inference_mode()
def test_a_row_is_the_same_whatever_is_measured_with_it(metric, probes):
    callback = metric()
    whole = values(callback.measure(Probe.stack(probes)))
    assert whole
    for cuts in ((1, 17), (3, 8, 17), (16, 17), tuple(range(1, 18))):
        starts = (0, *cuts[:-1])
        parts = [values(callback.measure(Probe.stack(probes[a:b]))) for a, b in zip(starts, cuts, strict=True)]
        for name, expected in whole.items():
            joined = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(joined, expected, rtol=1e-5, atol=2e-6, equal_nan=True, msg=f"{name}, {cuts}")
