"""Pages of long runs stay as small as those of short ones."""

import tracemalloc

import numpy as np
import pytest
from helpers.page_text import Page
from helpers.trajectories import heads, rows_of, store, toy

from svf_lightning.callbacks import AttentionSparsity, FeatureOrthogonality, SVDAlignment, quantities_of
from svf_lightning.pages.run import write_run_page
from svf_lightning.trajectory import TrajectoryStore

MAX_BYTES = 6e6  # 4.5 MB of them are plotly.js


@pytest.mark.slow
def test_the_page_of_a_hundred_thousand_steps_is_small_and_holds_no_matrix_of_all_steps(tmp_path):
    n, block = 100_000, 5_000
    rows = toy(n_steps=block)
    quantities = quantities_of((AttentionSparsity(), SVDAlignment(), FeatureOrthogonality()))
    trajectory = TrajectoryStore(tmp_path, rows_per_chunk=1_000)
    for start in range(0, n, block):
        trajectory.append(rows_of(rows.assign_coords(step=np.arange(start, start + block)), quantities))
    (tmp_path / "config.yaml").write_text("experiment: {name: long}")
    tracemalloc.start()
    page = write_run_page(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert page.stat().st_size < MAX_BYTES
    scalars = sum(variable.dims == ("step", "instance") for variable in rows.data_vars.values())
    assert peak < 64e6 + 4 * 8 * scalars * 2 * n  # the curves, and not the features and vectors, of every step
    assert "99,999" in Page(page).text


def test_the_page_of_sixty_checkpoints_is_small(tmp_path):
    page = write_run_page(store(tmp_path, heads(n_steps=60)))
    assert page.stat().st_size < MAX_BYTES
    assert Page(page).data["words-data"]["checkpoints"][-1]["name"].startswith("step ")
