"""Annotations of arrays are checked at every call while the tests run; where a test asks for it, they are not."""

import jaxtyping
import pytest
import torch

from svf_lightning.errors import InputError
from svf_lightning.metrics import cosine_matrix
from svf_lightning.rotary import rotate


def test_a_shape_that_an_annotation_forbids_is_found():
    with pytest.raises(jaxtyping.TypeCheckError, match="D=5"):
        cosine_matrix(torch.ones(5, 3), torch.ones(6, 2))


def test_a_type_that_an_annotation_forbids_is_found():
    with pytest.raises(jaxtyping.TypeCheckError):
        rotate(torch.ones(4, 6, dtype=torch.int64), torch.ones(4, 2), torch.ones(4, 2))


@pytest.mark.wrong_shapes
def test_without_the_annotations_the_function_answers_itself():
    with pytest.raises(InputError, match="features"):
        cosine_matrix(torch.ones(5, 3), torch.ones(6, 2))
