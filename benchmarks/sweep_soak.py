"""What a sweep of many short trials takes: seconds, memory of the process that waits, size of the page.

    python benchmarks/sweep_soak.py [--trials 100 300 1000] [--jobs N]

The time should be linear in the number of trials, the memory flat, and the page small.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

from svf_lightning.sweep.results import Sweep

_PERIOD = 0.2  # seconds between two looks at the memory


class Measured(NamedTuple):
    """What one sweep took."""

    trials: int
    done: int
    seconds: float
    memory_mb: float  # of the process that waits, at most
    page_mb: float


def sweep_file(n_trials: int, path: Path) -> Path:
    """A sweep of seeds and weights, each for ten steps of a small model."""
    seeds = max(1, n_trials // 5)
    parameters = {
        "model.lambda_attn": {"values": [1.0, 2.0, 3.0, 5.0, 10.0][: n_trials // seeds]},
        "seed_everything": {"values": list(range(seeds))},
        "model.n_instances": {"value": 1},
        "trainer.max_steps": {"value": 10},
        "capture.every_n_steps": {"value": 5},
        "data.batch_size": {"value": 8},
    }
    command = ["${env}", "${interpreter}", "-m", "svf_lightning", "fit", "--config", "robust_seed", "${args}"]
    path.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters, "command": command}, sort_keys=False))
    return path


def measure(n_trials: int, jobs: int) -> Measured:
    """Run a sweep by its command, and look at it."""
    with tempfile.TemporaryDirectory() as name:
        folder, start, memory = Path(name), time.perf_counter(), 0
        file = sweep_file(n_trials, folder / "soak.yaml")
        command = [sys.executable, "-m", "svf_lightning", "sweep", str(file), f"--jobs={jobs}"]
        environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [*command, "--sweep_dir", str(folder / "sweep")], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            waiting = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    memory = max(memory, waiting.memory_info().rss)
                except psutil.NoSuchProcess:
                    break
                time.sleep(_PERIOD)
        seconds = time.perf_counter() - start
        sweep = Sweep(folder / "sweep")
        done = sum(sweep.state(trial) == "done" for trial in sweep.trials)
        page = (folder / "sweep" / "report.html").stat().st_size
        return Measured(len(sweep.trials), done, seconds, memory / 1e6, page / 1e6)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print("| trials | done | seconds | seconds per trial | memory of the waiting process | page |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in options.trials:
        took = measure(n, options.jobs)
        each = took.seconds / took.trials
        print(
            f"| {took.trials} | {took.done} | {took.seconds:.0f} | {each:.2f} | {took.memory_mb:.0f} MB | "
            f"{took.page_mb:.1f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
