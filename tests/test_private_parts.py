"""Parts of libraries that are not public and that this package uses all the same, each with the version it was seen in.

A test that fails after an upgrade says where to look: at the place in the package that its name tells, and whether
there is a public way by now. Then the version here is the new one.
"""

import inspect
import pickle
from importlib.metadata import version

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger

from svf_lightning.cli.run import RunCLI
from svf_lightning.wandb_logger import RunLogger


def is_seen_in(package, series):
    return version(package).startswith(f"{series}.")


def test_the_cli_overrides_what_lightning_2_6_calls():
    assert is_seen_in("lightning", "2.6")
    for name in ("_parse_ckpt_path", "_run_subcommand"):
        assert name in vars(RunCLI)
        assert name in vars(LightningCLI)
        assert f"self.{name}(" in inspect.getsource(LightningCLI.__init__)
    assert list(inspect.signature(LightningCLI._run_subcommand).parameters) == ["self", "subcommand"]


def test_the_logger_keeps_its_run_where_lightning_2_6_leaves_it_out_of_a_pickle(tmp_path, monkeypatch):
    assert is_seen_in("lightning", "2.6")
    assert "_experiment" in vars(WandbLogger(save_dir=str(tmp_path)))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = RunLogger(save_dir=str(tmp_path))
    assert logger.experiment is not None
    assert pickle.loads(pickle.dumps(logger)).__dict__["_experiment"] is None


def test_the_command_line_of_a_trial_is_the_one_that_wandb_0_31_starts():
    assert is_seen_in("wandb", "0.31")
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    macros = create_sweep_command_args({"args": {"model.lambda_attn": {"value": 3}, "data.seed": {"value": 0}}})
    assert macros["args"] == ["--model.lambda_attn=3", "--data.seed=0"]
    assert create_sweep_command(["python", "-m", "x", "${args}"])[-1] == "${args}"


def test_what_is_derived_is_computed_by_the_indexing_that_xarray_2026_gives_to_backends():
    assert is_seen_in("xarray", "2026")
    from xarray.core import indexing

    for name in ("ExplicitIndexer", "IndexingSupport", "LazilyIndexedArray", "explicit_indexing_adapter"):
        assert hasattr(indexing, name)
