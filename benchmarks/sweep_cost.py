"""What a sweep costs in cohorts, against its trials as a process each.

    python benchmarks/sweep_cost.py sweeps/appendix_a.yaml [--sample 20] [--seconds S]

A sample of the trials, spread evenly over the file, is run by its own commands, as many at a time as there are cores,
with one thread each (on two cores that is faster than one after the other with two threads). With ``--seconds``, the
time of the whole sweep is one that was measured before; without, the sweep is run now.
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

from svf_lightning.sweep.file import Trial, read_sweep


def alone(trial: Trial, folder: Path) -> float:
    """Run one trial by its own command; seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "svf_lightning", *trial.args, "--run_dir", str(folder / trial.id)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--sample", type=int, default=20, help="trials that are run alone")
    parser.add_argument("--seconds", type=float, help="what the sweep took, if it was timed before")
    options = parser.parse_args()
    trials = read_sweep(options.file).trials()
    sample = [trials[k * len(trials) // options.sample] for k in range(options.sample)]
    jobs = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:
            each = list(pool.map(lambda trial: alone(trial, folder), sample))
        per_trial = (time.perf_counter() - start) / len(sample)
        whole = options.seconds
        if whole is None:
            start = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "svf_lightning",
                "sweep",
                options.file,
                "--sweep_dir",
                str(folder / "sweep"),
            ]
            subprocess.run(command, env=os.environ | {"WANDB_MODE": "offline"}, check=True, stdout=subprocess.DEVNULL)
            whole = time.perf_counter() - start
    print(f"{options.file}: {len(trials)} trials, {jobs} at a time")
    shortest, longest = min(each), max(each)
    print(f"alone, {len(sample)} of them: {shortest:.1f} to {longest:.1f} s each, {per_trial:.2f} s per trial")
    print(f"all alone, extrapolated: {per_trial * len(trials):,.0f} s")
    print(f"in cohorts: {whole:,.0f} s, {whole / len(trials):.2f} s per trial")
    print(f"ratio {per_trial * len(trials) / whole:.1f}")


if __name__ == "__main__":
    main()
