"""What several test files use. An assertion that fails in here shows its values, as in a test."""

import pytest

import helpers.shapes  # noqa: F401 (pyproject.toml names it to jaxtyping, which imports this package alone)

pytest.register_assert_rewrite("helpers.browser", "helpers.checkpoints", "helpers.command_line", "helpers.probes")
