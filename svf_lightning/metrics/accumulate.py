"""torchmetrics classes that accumulate what a loop over batches measures."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from svf_lightning.errors import bad_value


class InstanceMean(Metric):
    """Mean over the batches of a loop, one value per instance (torchmetrics' own mean would average the instances).

    Sums in float64. Synchronizes over processes by sum, as torchmetrics does.

    Args:
        shape: Shape of one batch's value, e.g. (n_instances,).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Float[Tensor, "..."], weight: float = 1.0) -> None:
        """Add one batch's value, with its weight (e.g. its number of sequences).

        Raises:
            InputError: The value has another shape than announced.
        """
        if value.shape != self.total.shape:
            raise bad_value("value.shape", tuple(value.shape), str(tuple(self.total.shape)), "pass one per instance")
        self.total += value.detach().to(self.total) * weight
        self.weight += weight

    def compute(self) -> Float[Tensor, "..."]:
        """Weighted mean so far; NaN before the first update; torchmetrics turns shape (1,) into ()."""
        return self.mean()

    def mean(self) -> Float[Tensor, "..."]:
        """Weighted mean so far, in the shape of one batch's value; NaN before the first update."""
        return self.total / self.weight
