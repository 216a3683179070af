"""Run directories that no training made: their numbers are chosen, so a test knows what happened in them."""

from dataclasses import replace

import numpy as np
import xarray as xr
import yaml

from svf_lightning.callbacks import (
    AttentionOverWords,
    AttentionSparsity,
    CausalAblation,
    FeatureOrthogonality,
    SVDAlignment,
    quantities_of,
)
from svf_lightning.rows import Rows
from svf_lightning.run.changes import changes_of
from svf_lightning.run.claims import Claim
from svf_lightning.run.settings import Experiment
from svf_lightning.run.summary import Result, summarize
from svf_lightning.trajectory import TrajectoryStore, open_trajectory

D, N, R = 5, 9, 5  # of the toy model: dimensions, features, singular vectors
QUERY, KEY = [0], [1]
LAYERS, HEADS, PROMPTS, WORDS, TOP, N_DRAWS = 2, 3, 4, 6, 2, 3  # of a replay
TEXT = "one two three four five six"
CLAIMS = [
    Claim(claim="features turn orthogonal", figure="Fig. 1b", metric="orthogonality/attended_vs_rest", relation="<=",
          threshold=0.02, over="max"),
    Claim(claim="alignment comes first", figure="Fig. 3", metric="dynamics/t_align", relation="<",
          other="dynamics/t_ortho", threshold=1.0),
    Claim(claim="and not in a rotated one", figure="Fig. 7b", metric="sad/sparseness_shared_rotation", of="change",
          relation=">=", threshold=-0.1, over="min"),
    Claim(claim="how strong?", figure="", metric="spectrum/sigma_1", over="max"),
]  # fmt: skip


def ramp(start, end, n_steps, n_instances=2):
    """A curve that goes from one value to another in the middle fifth of the rows [step, instance]."""
    share = np.clip((np.linspace(0, 1, n_steps) - 0.4) / 0.2, 0, 1)
    return np.repeat((start + (end - start) * share)[:, None], n_instances, 1).astype(np.float32)


def toy(n_steps=41, n_instances=2, *, aligns=True, orthogonal=True, sparser=True):
    """A training of the toy model in which things happen, or not, all numbers a run has.

    Where nothing happens, curves still move: alignment from one chance value to another, overlaps to an antipode each.
    """
    rng = np.random.default_rng(0)
    dims = ("step", "instance")
    shape = (n_steps, n_instances)
    scalars = {
        "loss/total": ramp(0.5, 0.1, *shape),
        "loss/recon": ramp(0.3, 0.05, *shape),
        "loss/attn": ramp(0.2, 0.05, *shape),
        "spectrum/sigma_1": ramp(1, 5 if aligns else 1.2, *shape),
        "spectrum/sigma_2": ramp(0.9, 0.1 if aligns else 1.0, *shape),
        "spectrum/sigma_ratio": ramp(0.9, 0.02 if aligns else 0.85, *shape),
        "alignment/matched": ramp(0.5, 0.999 if aligns else 0.55, *shape),
        "orthogonality/attended_vs_rest": ramp(0.35, 0.001 if orthogonal else 1 / 7, *shape),
        "orthogonality/rest_vs_rest": ramp(0.35, 0.15, *shape),
        "orthogonality/interference": ramp(2, 1, *shape),
    }
    for basis in ("", "_shared_rotation", "_independent_rotation"):
        end = 0.2 if sparser and not basis else 0.52
        scalars[f"sad/sparseness{basis}"] = ramp(0.5, end, *shape)
    arrays = {
        "W": (("d_model", "feature"), rng.normal(size=(*shape, D, N))),
        "U": (("d_model", "rank"), np.linalg.qr(rng.normal(size=(*shape, D, R)))[0]),
        "V": (("d_model", "rank"), np.linalg.qr(rng.normal(size=(*shape, D, R)))[0]),
        "singular_values": (("rank",), np.sort(rng.uniform(0.1, 5, (*shape, R)))[..., ::-1]),
        "pair/left": (("pair",), rng.uniform(size=(*shape, 1))),
        "pair/right": (("pair",), rng.uniform(size=(*shape, 1))),
        "pair/sigma": (("pair",), rng.uniform(size=(*shape, 1))),
        "pair/logit": (("pair",), rng.uniform(size=(*shape, 1))),
    }
    coords = {
        "step": np.arange(n_steps) * 10,
        "query_feature": ("pair", QUERY),
        "key_feature": ("pair", KEY),
        "target_logit": ("pair", np.array([5.0], dtype=np.float32)),
        "lambda_attn": ("instance", np.linspace(0, 10, n_instances).astype(np.float32)),
    }
    variables = {name: (dims, values) for name, values in scalars.items()}
    variables |= {name: ((*dims, *own), np.asarray(v, dtype=np.float32)) for name, (own, v) in arrays.items()}
    variables["pair/index"] = ((*dims, "pair"), np.zeros((*shape, 1), dtype=np.int32))
    return xr.Dataset(variables, coords=coords, attrs={"batch_dims": ("instance",)})


def heads(n_steps=5, *, sparser=True):
    """A replay of a language model."""
    rng = np.random.default_rng(1)
    dims = ("step", "layer", "head")
    shape = (n_steps, LAYERS, HEADS)
    fall = ramp(0.5, 0.1 if sparser else 0.6, n_steps, 1)[:, 0]

    def around(values, *more):
        return (values.reshape(-1, 1, 1, *(1,) * len(more)) * rng.uniform(0.95, 1.05, (*shape, *more))).clip(0, 1)

    flat = np.full(n_steps, 0.45)
    variables = {
        "sad/attention": (dims, around(flat)),
        "sad/sparseness": (dims, around(fall)),
        "sad/sparseness_shared_rotation": (dims, around(flat)),
        "sad/sparseness_independent_rotation": (dims, around(flat)),
        "sad/score": (dims, rng.normal(size=shape)),
        "sad/n_recon": (dims, rng.integers(1, R, shape) / 1.0),
        "sad/accuracy": (("step",), np.linspace(0.5, 1, n_steps)),
        "sad/task/sparseness": (("step",), fall),
        "prompt/attention": ((*dims, "prompt"), around(flat, PROMPTS)),
        "prompt/sparseness": ((*dims, "prompt"), around(fall, PROMPTS)),
        "draw/shared": ((*dims, "draw"), around(flat, N_DRAWS)),
        "draw/independent": ((*dims, "draw"), around(flat, N_DRAWS)),
        "contribution/mean": ((*dims, "rank"), rng.normal(size=(*shape, R))),
        "contribution/sd": ((*dims, "rank"), rng.uniform(size=(*shape, R))),
        "singular_values": ((*dims, "rank"), np.sort(rng.uniform(0.1, 9, (*shape, R)))[..., ::-1]),
        "causal/attention": (("step", "n_removed", "kind", "prompt"), rng.normal(size=(n_steps, 4, 3, PROMPTS))),
        "causal/logit_difference": (("step", "n_removed", "kind", "prompt"), rng.normal(size=(n_steps, 4, 3, PROMPTS))),
        "words/attention": ((*dims, "shown", "word"), around(flat, PROMPTS, WORDS)),
        "words/relative": ((*dims, "shown", "word"), rng.normal(size=(*shape, PROMPTS, WORDS))),
        "words/top": ((*dims, "shown", "word", "top"), rng.normal(size=(*shape, PROMPTS, WORDS, TOP))),
    }
    variables = {name: (d, np.asarray(values, dtype=np.float32)) for name, (d, values) in variables.items()}
    counts = {
        "prompt/top_index": ((*dims, "prompt"), rng.integers(0, R, (*shape, PROMPTS))),
        "prompt/n_recon": ((*dims, "prompt"), rng.integers(1, R, (*shape, PROMPTS))),
        "words/top_index": ((*dims, "shown", "top"), rng.integers(0, R, (*shape, PROMPTS, TOP))),
        "words/prompt": (("step", "shown"), np.tile(np.arange(PROMPTS), (n_steps, 1))),
        "task/layer_head": (("step", "task_head"), np.tile([4, 2], (n_steps, 1))),
        "causal/layer_head": (("step", "causal_head"), np.tile([4], (n_steps, 1))),
    }
    variables |= {name: (d, values.astype(np.int32)) for name, (d, values) in counts.items()}
    ends = np.cumsum([len(word) + 1 for word in TEXT.split()]) - 1
    spans = np.stack([np.maximum(0, [0, *ends[:-1]]), ends], 1)
    coords = {
        "step": np.array([0, *2 ** np.arange(n_steps - 1)]),
        "prompt_text": ("prompt", np.array([TEXT] * PROMPTS)),
        "token_span": (("prompt", "word", "end"), np.tile(spans, (PROMPTS, 1, 1))),
        "query_position": ("prompt", np.full(PROMPTS, WORDS - 1)),
        "key_position": ("prompt", np.full(PROMPTS, 2)),
    }
    return xr.Dataset(variables, coords=coords, attrs={"batch_dims": ("layer", "head")})


def changed(dataset, name, values):
    """The dataset with other values of a quantity."""
    return dataset.assign({name: (dataset[name].dims, np.asarray(values, dtype=dataset[name].dtype))})


def rows_of(dataset, quantities):
    """A dataset as rows on their way to the store."""
    values = {str(name): (v.dims[1:], np.ascontiguousarray(v.values)) for name, v in dataset.data_vars.items()}
    coords = {str(name): (v.dims, v.values) for name, v in dataset.coords.items() if name != "step"}
    return Rows(dataset["step"].values, values, dataset.attrs["batch_dims"], coords, quantities)


def store(folder, dataset, *, claims=CLAIMS, name="synthetic", config=None, quantities=None, status="finished"):
    """A run directory with these numbers, as a run would have left it."""
    is_replay = "layer" in dataset.sizes
    metrics = (AttentionSparsity(), SVDAlignment(), FeatureOrthogonality(), CausalAblation(), AttentionOverWords())
    quantities = quantities_of(metrics) if quantities is None else quantities
    rows = rows_of(dataset, quantities)
    TrajectoryStore(folder).append(rows)
    settings = {"experiment": {"name": name}, "model": {"d_model": D}, "trainer": {"max_steps": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings if config is None else config))
    if is_replay:
        (folder / "identity.json").write_text("{}")
    result = replace(Result.of_rows(rows), status=status, seconds=1.0, quantities=quantities)
    if not is_replay:
        result = result.with_changes(changes_of(open_trajectory(folder), quantities))
    summarize(folder, Experiment(name, claims=list(claims)), result)
    return folder
