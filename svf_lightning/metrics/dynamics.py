"""When things happen during training (arXiv 2602.13524, Fig. 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from svf_lightning.errors import bad_value


def time_of_change(
    series: Float[Tensor, "T ..."], steps: Int[Tensor, " T"], *, fraction: float = 0.9
) -> Float[Tensor, "..."]:
    """First step from which a quantity has covered ``fraction`` of its way from first to last value, and stays there.

    Works for a rise and for a fall alike. ``fraction = 0.9`` on ``alignment/matched`` is t_align, on
    ``orthogonality/attended_vs_rest`` t_ortho.

    Args:
        series: Values over T recorded steps.
        steps: Training step of each value, ascending.
        fraction: Share of the way, in (0, 1].

    Returns:
        A training step, as a float; NaN where the series holds NaN or ends where it began.

    Raises:
        InputError: Empty series, or lengths that differ.
    """
    if len(series) == 0 or len(series) != len(steps):
        raise bad_value(
            "series", len(series), f"as many values as steps ({len(steps)}), at least one", "pass both from one run"
        )
    way = series[-1] - series[0]
    progress = (series - series[0]) / way
    reached = progress >= fraction
    stays = reached.flip(0).cummin(0).values.flip(0)  # bool cummin: True while every later value is True
    first = stays.to(torch.int8).argmax(0)
    time = steps.to(series.device, torch.float64)[first]
    valid = torch.isfinite(series).all(0) & (way != 0)
    return torch.where(valid, time, torch.nan)
