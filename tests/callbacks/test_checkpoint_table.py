"""CheckpointTable: one line for each checkpoint of the directory, and what went wrong."""

import re

import numpy as np
from helpers.replays import STEPS, replay

from svf_lightning.callbacks import AttentionSparsity, CheckpointTable, ProbeMetric, Quantity, quantities_of
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.rows import Rows
from svf_lightning.run.ledger import Entry, Ledger
from svf_lightning.run.settings import Experiment, Run
from svf_lightning.trajectory import TrajectoryStore


def table_of(shown):
    """Cells of each line of a table, its titles first."""
    lines = [re.split(r"[│┃]", line)[1:-1] for line in shown.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line] for line in lines]


def write(run_dir, steps, hashes, **columns):
    values = {name.replace("__", "/"): ((), np.asarray(column, dtype="f4")) for name, column in columns.items()}
    values["weight_hash"] = ((), np.array(hashes, dtype="<U64"))
    TrajectoryStore(run_dir).append(Rows(np.asarray(steps), values, ("layer", "head")))


def test_a_replay_ends_with_a_line_for_each_checkpoint_whenever_it_was_measured(suite, tmp_path, capsys):
    replay(FolderCheckpoints(str(suite), steps=[0, 8]), tmp_path)
    capsys.readouterr()
    rows = replay(FolderCheckpoints(str(suite)), tmp_path, callbacks=(CheckpointTable(),))
    shown = capsys.readouterr().out
    titles, *lines = table_of(shown)
    assert titles == ["step", "accuracy", "logits", "attn", "S(v)", "shared", "indep", "N_recon"]
    assert [line[0] for line in lines] == [str(step) for step in STEPS]
    for name, title in (("sad/task/attention", "attn"), ("sad/task/sparseness", "S(v)"), ("sad/accuracy", "accuracy")):
        column = [line[titles.index(title)] for line in lines]
        assert column == [f"{value:.3f}" for value in rows[name].values]
    assert "failed" not in shown
    assert "same weights" not in shown


def test_a_quantity_of_a_user_gets_a_column_if_it_names_one(tmp_path, capsys):
    class Mine(ProbeMetric):
        quantities = (Quantity("own/number", column="mine"), Quantity("own/other"))

        def measure(self, probe):
            return {}

    write(tmp_path, [0, 1000], ["a", "b"], own__number=[0.25, 0.5], own__other=[1, 2])
    CheckpointTable().show(tmp_path, quantities_of([Mine(), AttentionSparsity()]))
    # those of AttentionSparsity are known, but not measured
    assert table_of(capsys.readouterr().out) == [["step", "mine"], ["0", "0.250"], ["1,000", "0.500"]]


def test_checkpoints_that_failed_and_those_that_are_flagged_are_named_below(tmp_path, capsys):
    hashes = {0: "a", 1: "a", 2: "b", 1000: "c", 2000: "b"}
    write(tmp_path, list(hashes), list(hashes.values()))
    ledger = Ledger(tmp_path)
    for step, weight_hash in hashes.items():
        ledger.record(Entry(step, f"step{step}", "done", weight_hash=weight_hash))
    ledger.record(Entry(4000, "step4000", "failed", error="step4000: no [network]"))
    CheckpointTable().show(tmp_path, {})
    below = capsys.readouterr().out.splitlines()[-5:]
    assert below == [
        "step 1 has the weights of step 0, bit for bit",
        "  it is left out of curves and figures",
        "step 2 has the weights of step 2,000, the last one, bit for bit",
        "  it is left out of curves and figures",
        "step 4,000 failed: step4000: no [network]",
    ]


def test_a_directory_without_a_row_has_no_table_but_its_failures(tmp_path, capsys):
    Ledger(tmp_path).record(Entry(3, "step3", "failed", error="gone"))
    CheckpointTable().show(tmp_path, {})
    assert capsys.readouterr().out == "step 3 failed: gone\n"


def test_on_the_command_line_some_of_many_checkpoints_are_shown_and_all_of_few(tmp_path, capsys):
    steps = list(range(0, 130, 10))
    write(tmp_path, steps, [str(step) for step in steps], own__number=np.linspace(0, 1, 13))
    known = {"own/number": Quantity("own/number", column="mine")}
    table = CheckpointTable()
    table.join(Run(tmp_path, "replay", Experiment()))
    table.show(tmp_path, known)
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:6]] == ["0", "40", "80", "120"]
    assert "4 of 13; all: --verbose" in shown
    table.join(Run(tmp_path, "replay", Experiment(), verbose=True))
    table.show(tmp_path, known)
    assert len(table_of(capsys.readouterr().out)) == 14
