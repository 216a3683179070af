"""A package of a user: nothing in svf_lightning knows of it."""

from svf_lightning.callbacks import Capture, ProbeMetric, Quantity


class FeatureNorms(ProbeMetric):
    """A scalar, a vector and a matrix of its own."""

    quantities = (
        Quantity(
            "norm/mean", "mean length of the features", "How long they are.", unit="length", low=0, column="length"
        ),
        Quantity("norms", "length of a feature", unit="length", low=0, dims=("feature",)),
        Quantity("shares", "share of a feature in a dimension", unit="share", dims=("d_model", "feature")),
    )

    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def measure(self, probe):
        """Lengths of the columns of W, and the share of each entry."""
        if probe.features is None:
            return {}
        norms = probe.features.norm(p=self.power, dim=-2)
        return {"norm/mean": norms.mean(-1), "norms": norms, "shares": probe.features / norms[..., None, :]}


class HeadNorms(ProbeMetric):
    """A number for each head of any module."""

    quantities = (Quantity("head/norm", "length of W_Q", unit="length", low=0, column="|W_Q|"),)

    def measure(self, probe):
        """Frobenius norm of W_Q."""
        return {"head/norm": probe.heads.W_Q.flatten(-2).norm(dim=-1)}


class AlignmentAgain(ProbeMetric):
    """Takes a name that is taken."""

    quantities = (Quantity("alignment/matched"),)

    def measure(self, probe):
        """Nothing."""
        return {}


class Forgetful(ProbeMetric):
    """Does not keep its argument."""

    quantities = (Quantity("forgetful/number"),)

    def __init__(self, power: float = 2.0) -> None:
        self._exponent = power

    def measure(self, probe):
        """Nothing."""
        return {}


class CarefulCapture(Capture):
    """A Capture of the user's own."""
