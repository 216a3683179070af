"""What trains: feature draws, templates, and the toy model."""

from svf_lightning.toy.features import ToyData, sparse_activations
from svf_lightning.toy.model import ToyAttentionModel
from svf_lightning.toy.template import Template, make_template

__all__ = ["Template", "ToyAttentionModel", "ToyData", "make_template", "sparse_activations"]
