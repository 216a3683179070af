"""What the tests check annotations with: shapes and types of arrays. All other annotations are left to mypy.

pytest's option ``--jaxtyping-packages`` (pyproject.toml) has every function of the package decorated with it.
"""

from __future__ import annotations

from typing import Any, get_args

import jaxtyping
from beartype import beartype


def checked(function: Any) -> Any:
    """The function with its annotations of arrays checked at every call."""
    function.__annotations__ = {
        name: annotation for name, annotation in function.__annotations__.items() if _has_array(annotation)
    }
    return beartype(function) if function.__annotations__ else function


def _has_array(annotation: object) -> bool:
    is_array = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_array or any(map(_has_array, get_args(annotation)))
