"""What a sweep costs in cohorts, against its trials as a process each.

    python benchmarks/sweep_cost.py sweeps/appendix_a.yaml [--sample 20] [--jobs N]

A sample of the trials, spread evenly over the file, is run by its own commands: half of it before the sweep and half
after, as the speed of a shared machine changes. By default as many processes at a time as there are cores, with one
thread each; ``--jobs 1`` runs one after the other with all cores, as an agent does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from svf_lightning.sweep.file import read_sweep
from svf_lightning.sweep.trial import Trial


def alone(trial: Trial, folder: Path, threads: int) -> float:
    """Run one trial by its own command; seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "svf_lightning", *trial.args, "--run_dir", str(folder / trial.id)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def whole(file: str, folder: Path) -> float:
    """Run the sweep by its command; seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "svf_lightning", "sweep", file, "--sweep_dir", str(folder / "sweep")]
    subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--sample", type=int, default=20, help="trials that are run alone")
    parser.add_argument("--jobs", type=int, default=cores, help="processes at a time, for these")
    options = parser.parse_args()
    trials = read_sweep(options.file).trials()
    sample = [trials[k * len(trials) // options.sample] for k in range(options.sample)]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        each: list[float] = []

        def run(some: list[Trial]) -> float:
            start = time.perf_counter()
            each.extend(pool.map(lambda trial: alone(trial, folder, max(1, cores // options.jobs)), some))
            return time.perf_counter() - start

        before = run(sample[::2])
        together = whole(options.file, folder)
        after = run(sample[1::2])
    per_trial = (before + after) / len(sample)
    print(f"{options.file}: {len(trials)} trials, {cores} cores")
    print(f"alone, {len(sample)} of them, {options.jobs} at a time: {min(each):.1f} to {max(each):.1f} s each")
    halves = f"{2 * before / len(sample):.2f} before the sweep, {2 * after / len(sample):.2f} after it"
    print(f"alone: {per_trial:.2f} s per trial ({halves}); all, extrapolated: {per_trial * len(trials):,.0f} s")
    print(f"in cohorts: {together / len(trials):.2f} s per trial; all: {together:,.0f} s")
    print(f"ratio {per_trial * len(trials) / together:.1f}")


if __name__ == "__main__":
    main()
