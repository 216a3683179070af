"""The command that replays checkpoints of real models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from svf_lightning.arguments import CommandLine
from svf_lightning.cli.naming import name_by_what_is_measured
from svf_lightning.cli.presets import COMMANDS, CONFIG_FLAGS
from svf_lightning.cli.run import RunCLI
from svf_lightning.run.directory import RUNS, check_free, is_replay, new_run_dir
from svf_lightning.run.ledger import Ledger
from svf_lightning.run.lineage import Parent
from svf_lightning.terminal import say

_RUN_DIR = "SVF_LIGHTNING_RUN_DIR"


class ReplayCLI(RunCLI):
    """The command that replays checkpoints of real models."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand, with the trainer arguments that do not come from the command line."""
        return {"replay": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a replay has more."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--remeasure",
            type=str | None,
            default=None,
            help="Directory of a replay whose checkpoints are to be measured again, with its settings and those of "
            "this call; its own rows stay as they are.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and name the run by what it measures."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        files = CommandLine(args, COMMANDS).values(*CONFIG_FLAGS)
        parser_of_it = self.parser_of[self.config.subcommand]
        line = name_by_what_is_measured(
            config, args, files, lambda chosen: parser_of_it.parse_args([f"--config={file}" for file in chosen])
        )
        if line and "LOCAL_RANK" not in os.environ:
            say(line)

    def _choose_run_dir(self, config: Namespace) -> Path:
        inherited = os.environ.get(_RUN_DIR)  # processes of further devices run the same command line
        if inherited is not None and "LOCAL_RANK" in os.environ:
            return Path(inherited)
        run_dir = Path(config.run_dir) if config.run_dir else new_run_dir(config.experiment.name, RUNS)
        if not is_replay(run_dir):
            check_free(run_dir)
            if config.remeasure:
                self.parent = Parent(config.remeasure)
        os.environ[_RUN_DIR] = str(run_dir)
        return run_dir

    def _begin_run(self) -> None:
        if not is_replay(self.run_dir):  # the settings of a run that goes on stay
            super()._begin_run()

    def before_replay(self) -> None:
        """Take the directory for this process, and check that a replay that goes on is the same one."""
        self.model.check(self.trainer, self.datamodule)
        if self.trainer.is_global_zero:
            self.lock.acquire()
        if not self.datamodule.missing(self.run_dir):
            say("every checkpoint is there already: nothing to replay")

    def after_replay(self) -> None:
        """Tell by the exit code whether every checkpoint is there; with ``strict``, and none is flagged."""
        flagged = Ledger(self.run_dir).flagged() if self.datamodule.strict else {}
        if flagged:
            steps = ", ".join(f"{step:,}" for step in flagged)
            say(f"svf-lightning: --data.strict=true, and these steps are flagged: {steps}")
        self.exit_code = 1 if flagged or self.datamodule.missing(self.run_dir) else 0
