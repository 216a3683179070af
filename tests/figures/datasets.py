"""Runs of random numbers, for the figures of the toy model, and what figures hold."""

import numpy as np
import xarray as xr

T, N_I, D, N, R, P = 13, 3, 5, 11, 7, 2  # one size per axis
QUERY, KEY = [4, 2], [9, 0]
N_HEADS, OFFSETS = 4, [1, 2, 3, 5, 8, 9]
STRENGTHS = [0.5, 2.0, 0.5]
NAMES = [
    "fig_1a",
    "fig_1b",
    "fig_2a",
    "fig_2b",
    "fig_3",
    "fig_4",
    "against_lambda",
    "spectrum_over_time",
    "alignment_over_time",
    "pair_map",
    "head_shares",
    "by_offset",
    "cone_over_time",
]


def synthetic(steps=None):
    """Random numbers under the names of a run; every value differs from every other."""
    rng = np.random.default_rng(0)
    steps = np.arange(T) * 10 if steps is None else np.asarray(steps)
    n = len(steps)

    def cosines(*shape):
        return rng.uniform(0.05, 0.95, shape)

    W = rng.normal(size=(n, N_I, D, N))
    unit = W / np.linalg.norm(W, axis=-2, keepdims=True)
    per_instance = {
        f"{name}": (("step", "instance"), cosines(n, N_I))
        for name in (
            "alignment/matched",
            "orthogonality/attended_vs_rest",
            "orthogonality/interference",
            "theory/left",
            "theory/right",
            "theory/predicted_cosine",
            "theory/bound",
        )
    }
    arrays = {
        "W": (("step", "instance", "d_model", "feature"), W),
        "gram": (("step", "instance", "feature", "feature_2"), unit.swapaxes(-1, -2) @ unit),
        "dimensionality": (("step", "instance", "feature"), cosines(n, N_I, N)),
        "cosine_left": (("step", "instance", "feature", "rank"), cosines(n, N_I, N, R)),
        "cosine_right": (("step", "instance", "feature", "rank"), cosines(n, N_I, N, R)),
        "singular_values": (("step", "instance", "rank"), np.sort(cosines(n, N_I, R))[..., ::-1] * 9),
        "pair/left": (("step", "instance", "pair"), cosines(n, N_I, P)),
        "pair/right": (("step", "instance", "pair"), cosines(n, N_I, P)),
        "pair/sigma": (("step", "instance", "pair"), cosines(n, N_I, P) * 9),
        "pair/index": (("step", "instance", "pair"), np.broadcast_to([3, 1], (n, N_I, P)).copy()),
    }
    coords = {
        "step": steps,
        "lambda_attn": ("instance", [1.0, 5.0, 20.0]),
        "query_feature": ("pair", QUERY),
        "key_feature": ("pair", KEY),
        "target_logit": (("instance", "pair"), rng.uniform(1, 9, (N_I, P))),
    }
    return xr.Dataset({**per_instance, **arrays}, coords=coords)


def several_heads():
    """A run with several heads: every head has numbers of its own."""
    rng = np.random.default_rng(1)
    run = synthetic()
    share = rng.uniform(size=(T, N_I, N_HEADS, P))
    own = {
        "head/share": (("step", "instance", "head", "pair"), share / share.sum(2, keepdims=True)),
        "heads/participation": (("step", "instance"), rng.uniform(1, N_HEADS, (T, N_I))),
        "heads/best": (("step", "instance"), rng.uniform(size=(T, N_I))),
        "heads/combined": (("step", "instance"), rng.uniform(size=(T, N_I))),
    }
    return per("head", N_HEADS, run).assign(own)


def rotary():
    """A run with rotary positions: every offset has numbers of its own."""
    rng = np.random.default_rng(2)
    own = {"pair/logit": (("step", "instance", "offset", "pair"), rng.normal(size=(T, N_I, len(OFFSETS), P)))}
    own["spectrum/sigma_1"] = (("step", "instance", "offset"), rng.uniform(1, 9, (T, N_I, len(OFFSETS))))
    return per("offset", len(OFFSETS), synthetic()).assign_coords(offset=OFFSETS).assign(own)


def per(dim, size, run):
    """The run with a further dimension for all that a head has."""
    scale = xr.DataArray(np.linspace(0.5, 1, size), dims=dim)
    of_head = [name for name in run.data_vars if name.startswith(("alignment/", "pair/", "cosine_", "singular"))]
    return run.assign({name: (run[name] * scale).transpose("step", "instance", dim, ...) for name in of_head})


def cone():
    rng = np.random.default_rng(3)
    own = {name: (("step", "instance"), rng.uniform(size=(T, N_I))) for name in ("theory/cone_left", "alignment/left")}
    return synthetic().assign(own).assign_coords(cone_strength=("instance", STRENGTHS))


SPECIAL = {"head_shares": several_heads, "by_offset": rotary, "cone_over_time": cone}


def run_for(name):
    """A run with what the figure shows."""
    return SPECIAL.get(name, synthetic)()


def traces(figure, kind, axis=None):
    return [t for t in figure.data if t.type == kind and (axis is None or (t.xaxis or "x") == axis)]


def named(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def last(run, name, **at):
    return run[name].isel(step=-1, **at).values
