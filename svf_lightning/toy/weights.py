"""Where the weights of a toy model start: features of controlled geometry, heads that are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from svf_lightning.draws import keyed_generator
from svf_lightning.errors import InputError, bad_value
from svf_lightning.heads import AttentionHeads
from svf_lightning.matrix_files import FORMATS, read_matrices
from svf_lightning.metrics import unit_features
from svf_lightning.theory import optimal_omega
from svf_lightning.toy.template import Template

FEATURE_KINDS = ("random", "orthonormal", "tight_frame", "cone")
HEAD_KINDS = ("random", "optimal", "aligned")
_AXIS = 1  # key of the axis of a cone
_FRAME_STEPS = 2000
_FRAME_TOLERANCE = 1e-9


def initial_features(
    kind: str,
    *,
    n_features: int,
    d_model: int,
    seeds: Sequence[int],
    cone_strength: Float[Tensor, " I"],
) -> Float[Tensor, "I D N"]:
    """Feature matrices W, one per seed, float64.

    Args:
        kind: "random": independent normal entries, columns of length 1 on average (root mean square). "orthonormal":
            N <= D orthonormal columns. "tight_frame": unit columns with W W^T = (N/D) I, N >= D. "cone": a tight frame
            with ``cone_strength`` times one random unit direction added to every column, columns made unit again
            (N >= D); strength 0 is the frame itself, and ||E_X||_2 grows with it. Or a .npy or .safetensors file that
            holds W [D, N], or [I, D, N].
        n_features: N.
        d_model: D.
        seeds: One per instance.
        cone_strength: s, one per instance, >= 0; used by "cone" alone.

    Raises:
        InputError: A geometry that does not exist for these sizes, an unknown name, or a file that does not fit.
    """
    N, D = n_features, d_model
    if kind not in FEATURE_KINDS:
        return _from_file(kind, "init_features", {"W": (D, N)}, len(seeds))["W"]
    if kind == "orthonormal" and N > D:
        raise bad_value(
            "init_features", kind, f"orthonormal features only for n_features <= d_model={D}", "tight_frame"
        )
    if kind in ("tight_frame", "cone") and N < D:
        raise bad_value("init_features", kind, f"{kind} only for n_features >= d_model={D}", "use orthonormal")
    made = []
    for seed, strength in zip(seeds, cone_strength, strict=True):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(D, N, generator=generator)
        if kind == "random":
            made.append(start.double() / D**0.5)
        elif kind == "orthonormal":
            made.append(torch.linalg.qr(start.double()).Q)
        else:
            frame = unit_norm_tight_frame(start.double())
            axis = torch.randn(
                D, 1, generator=keyed_generator(seed, _AXIS)
            ).double()  # the head is drawn from seed, too
            tilted = frame + (strength if kind == "cone" else 0.0) * axis / axis.norm()
            made.append(tilted / tilted.norm(dim=0))
    return torch.stack(made)


def unit_norm_tight_frame(start: Float[Tensor, "D N"]) -> Float[Tensor, "D N"]:
    """Unit columns with ``X X^T = (N/D) I``, near a given matrix (N >= D), by alternating projection.

    The two projections are the nearest tight frame (polar factor) and the nearest unit columns (Tropp et al. 2005,
    *Designing structured tight frames via an alternating projection method*).

    Raises:
        InputError: It does not converge from this start (not seen for random ones).
    """
    D, N = start.shape
    x: Tensor = start / start.norm(dim=0)
    target = torch.eye(D, dtype=x.dtype) * (N / D)
    for _ in range(_FRAME_STEPS):
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        x = (N / D) ** 0.5 * U @ Vh
        x = x / x.norm(dim=0)
        if float((x @ x.mT - target).abs().max()) < _FRAME_TOLERANCE * N / D:
            return x
    raise InputError(f"no unit-norm tight frame of {N} features in {D} dimensions was found. Fix: change --model.seed.")


def initial_head(
    kind: str, *, features: Float[Tensor, "I D N"], template: Template, d_head: int
) -> tuple[Float[Tensor, "I H D"], Float[Tensor, "I H D"]]:
    """W_Q and W_K that are given rather than drawn.

    Args:
        kind: "optimal": least-squares optimum of the logits for these features and this template (Theorem 1).
            "aligned": X T X^T with unit columns X; for a single pair its singular vectors are the features themselves
            (Corollary 1). Both are cut to rank H, their singular values shared evenly between W_Q and W_K. Or a
            .safetensors file that holds W_Q and W_K, [H, D] or [I, H, D].
        features: W.
        template: T.
        d_head: H (all heads together).

    Raises:
        InputError: An unknown name, or a file that does not fit.
    """
    n_instances, d_model, _ = features.shape
    if kind not in HEAD_KINDS:
        given = _from_file(kind, "init_head", {"W_Q": (d_head, d_model), "W_K": (d_head, d_model)}, n_instances)
        return given["W_Q"], given["W_K"]
    wide = features.double()
    T = template.matrix().double()
    if kind == "optimal":
        omega = optimal_omega(wide, T, wide)
    else:
        x = unit_features(wide)
        omega = x @ T @ x.mT
    U, S, V = AttentionHeads(torch.eye(d_model).double().expand_as(omega), omega).svd()
    rank = min(d_head, d_model)
    root = S[..., :rank].sqrt()
    W_Q, W_K = (features.new_zeros(n_instances, d_head, d_model).double() for _ in range(2))
    W_Q[:, :rank] = (U[..., :rank] * root[..., None, :]).mT
    W_K[:, :rank] = (V[..., :rank] * root[..., None, :]).mT
    return W_Q, W_K


def _from_file(
    given: str, option: str, shapes: dict[str, tuple[int, int]], n_instances: int
) -> dict[str, Float[Tensor, "I n m"]]:
    """Matrices from a file, float64, one per instance; only formats that cannot run code."""
    path = Path(given)
    if path.suffix not in FORMATS:
        kinds = FEATURE_KINDS if option == "init_features" else HEAD_KINDS
        raise bad_value(
            option, given, f"{', '.join(kinds)}, or a .npy or .safetensors file", f"change --model.{option}"
        )
    tensors = read_matrices(option, path, f"finite {', '.join(shapes)} in a .npy or .safetensors file")
    if len(shapes) == len(tensors) == 1:
        tensors = dict(zip(shapes, tensors.values(), strict=True))  # the name of a file's only matrix does not matter
    matrices = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) not in (shape, (n_instances, *shape)) or not tensor.isfinite().all():
            has = {key: tuple(value.shape) for key, value in tensors.items()}
            raise InputError(
                f"{option}: {given} holds {has}. Allowed: finite {name} of shape {shape}, or {(n_instances, *shape)} "
                "with one per instance. Fix: export the matrix in this shape, or change the model's sizes."
            )
        matrices[name] = tensor.double().expand(n_instances, *shape)
    return matrices
