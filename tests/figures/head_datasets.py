"""Synthetic runs with scores taken apart over singular pairs: of a language model's heads, and of the toy model."""

import numpy as np
import xarray as xr

STEPS = [0, 1, 3, 10, 40, 100, 700]
T, L, H, R, P, N_DRAWS = 7, 5, 11, 17, 13, 19  # one size per axis
N_REMOVED, N_I, N_TEMPLATES = 23, 3, 12
SIDES = ("left", "right")
TASK = [(4, 2), (0, 9)]  # of the last step; other heads before
NO_SCORE = (3, 7)  # a head that sees one key only
OF_HEADS = (  # figures of a language model
    "fig_7a",
    "fig_7b",
    "fig_8",
    "fig_9",
    "heads_map",
    "causal",
    "interventions",
    "unwhitening",
)
NAMES = (*OF_HEADS, "sparsity_over_time")


def synthetic():
    """A replay with random numbers under the names of a run; every value differs from every other."""
    rng = np.random.default_rng(0)
    heads = ("step", "layer", "head")
    scalars = {
        f"sad/{name}": (heads, rng.uniform(0.05, 0.9, (T, L, H))) for name in ("attention", "sparseness", "score")
    }
    scalars["sad/n_recon"] = (heads, rng.integers(2, 2 * R, (T, L, H)) / 2)
    per_prompt = {
        f"prompt/{name}": ((*heads, "prompt"), rng.uniform(0.01, 0.99, (T, L, H, P)))
        for name in ("attention", "sparseness")
    }
    counts = {"top_index": rng.integers(0, R, (T, L, H, P)), "n_recon": rng.integers(1, R + 1, (T, L, H, P))}
    for values in per_prompt.values():
        values[1][:, *NO_SCORE] = np.nan
    for name, values in counts.items():
        values[:, *NO_SCORE] = -1
        per_prompt[f"prompt/{name}"] = ((*heads, "prompt"), values.astype(np.int16))
    for name in ("attention", "sparseness", "n_recon"):
        scalars[f"sad/{name}"][1][:, *NO_SCORE] = np.nan
    task = rng.integers(0, L * H, (T, 2))
    task[-1] = [layer * H + head for layer, head in TASK]
    contribution = rng.normal(size=(T, L, H, R))
    contribution[:, *NO_SCORE] = np.nan
    arrays = {
        "contribution/mean": ((*heads, "rank"), contribution),
        "contribution/sd": ((*heads, "rank"), abs(contribution) + rng.uniform(size=(T, L, H, R))),
        "singular_values": ((*heads, "rank"), np.sort(rng.uniform(0.1, 9, (T, L, H, R)))[..., ::-1]),
        "draw/shared": ((*heads, "draw"), rng.uniform(0.3, 0.5, (T, L, H, N_DRAWS))),
        "draw/independent": ((*heads, "draw"), rng.uniform(0.2, 0.4, (T, L, H, N_DRAWS))),
        "draw/permuted": ((*heads, "draw"), rng.uniform(0.1, 0.3, (T, L, H, N_DRAWS))),
        "sad/sparser": (heads, rng.integers(0, 2, (T, L, H)) / 1.0),
        "sad/denser": (heads, rng.integers(0, 2, (T, L, H)) / 1.0),
        "task/layer_head": (("step", "task_head"), task.astype(np.int32)),
        "sad/accuracy": ("step", rng.uniform(size=T)),
        "causal/attention": (("step", "n_removed", "kind", "prompt"), rng.normal(size=(T, N_REMOVED, 3, P))),
        "causal/logit_difference": (("step", "n_removed", "kind", "prompt"), rng.normal(size=(T, N_REMOVED, 3, P))),
        "causal/layer_head": (("step", "causal_head"), task[:, :1].astype(np.int32)),
        **directions(rng, task[:, :2]),
        **unwhitened(),
    }
    return xr.Dataset({**scalars, **per_prompt, **arrays}, coords={"step": STEPS})


def directions(rng, task):
    """What DirectionIntervention measures, at the last step but one; it was not asked for elsewhere."""
    dims = {"ablated": (2, 2, 8), "boosted": (2, 8), "patched": (3, 2, 8), "alone": (2, 2, 8)}
    first = {"ablated": ("n_directions",), "boosted": (), "patched": ("source",), "alone": ("direction_head",)}
    variables = {}
    for effect in ("attention", "logit_difference", "divergence"):
        for kind, shape in dims.items():
            values = rng.normal(size=(T, *shape, N_TEMPLATES))
            values[np.arange(T) != T - 2] = np.nan
            if kind == "patched":
                values[:, 2] = values[:, :, :, 6] = np.nan  # no counterfactuals of a file; nothing to be matched
            its = ("step", *first[kind], "side", "choice", "template")
            variables[f"directions/{kind}/{effect}"] = (its, values)
        for side in ("query", "key"):
            for end in ("", "_strongest_control", "_matched"):
                values = rng.normal(size=(T, N_TEMPLATES))
                variables[f"template/directions/{side}/{effect}{end}"] = (("step", "template"), values)
    variables["directions/query/heads_beyond_controls"] = ("step", np.arange(T) / 1.0)
    variables["directions/key/heads_beyond_controls"] = ("step", np.arange(T)[::-1] / 1.0)
    variables["directions/numbers"] = (("step", "n_directions"), np.tile([1, 4], (T, 1)).astype(np.int32))
    variables["directions/layer_head"] = (("step", "direction_head"), task.astype(np.int32))
    return variables


def unwhitened():
    """What Unwhitening measures."""
    rng = np.random.default_rng(3)
    names = [
        f"{form}{end}{side}" for form in ("", "plain_") for end in ("", "random_", "percentile_") for side in SIDES
    ]
    variables = {f"unwhitening/{name}": (("step", "layer", "head"), rng.uniform(size=(T, L, H))) for name in names}
    return {**variables, "unwhitening/tokens": (("step", "layer"), np.full((T, L), 4321.0))}


def with_firings(run):
    """The run with histograms of firings under the names of the Firings callback; one head never fires."""
    rng = np.random.default_rng(2)
    histograms = {
        "top_index_histogram": (rng.integers(0, 50, (T, L, H, R)), "rank"),
        "n_recon_histogram": (rng.integers(0, 50, (T, L, H, R + 1)), "n_recon"),
        "n_recon_histogram_rotated": (rng.integers(0, 200, (T, L, H, R + 1)), "n_recon"),
    }
    for counts, dim in histograms.values():
        counts[:, *NO_SCORE] = 0
        if dim == "n_recon":
            counts[..., -2:] = 0  # no score needs all
    return run.assign(
        {f"firings/{name}": (("step", "layer", "head", dim), counts) for name, (counts, dim) in histograms.items()}
    )


def toy():
    """A run of the toy model."""
    rng = np.random.default_rng(1)
    controls = ("shared_rotation", "independent_rotation", "permuted_pairing")
    names = ("sparseness", *(f"sparseness_{control}" for control in controls))
    scalars = {f"sad/{name}": (("step", "instance"), rng.uniform(0.1, 0.6, (T, N_I))) for name in names}
    scalars["alignment/matched"] = (("step", "instance"), rng.uniform(size=(T, N_I)))
    sigma = (("step", "instance", "rank"), rng.uniform(size=(T, N_I, R)))
    return xr.Dataset({**scalars, "singular_values": sigma}, coords={"step": STEPS})


def run_for(name):
    return toy() if name == "sparsity_over_time" else synthetic()


def without(run, name, *place):
    """The run with NaN (or -1, for counts) at a place of a quantity."""
    values = run[name].values.copy()
    values[place] = -1 if values.dtype.kind == "i" else np.nan
    return run.assign({name: (run[name].dims, values)})


def named(figure, name, axis="x"):
    (found,) = [t for t in figure.data if t.name == name and (t.xaxis or "x") == axis]
    return found


def values_in(table, quantity, dims):
    """Values of a quantity in a figure's table, which has these dimensions for it and no others."""
    rows = table[table["quantity"] == quantity]
    assert [dim for dim in table.columns[1:-1] if rows[dim].notna().all()] == [
        dim for dim in table.columns[1:-1] if dim in dims
    ]
    return rows["value"].to_numpy(dtype=float)
