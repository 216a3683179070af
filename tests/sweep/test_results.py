"""Table and page of a sweep come whatever is in the directories of its trials, and say which of them is wrong."""

import json
import shutil

import pytest
from helpers.sweeps import SIX, done_sweep, write_sweep

from svf_lightning.commands.report import report_sweep
from svf_lightning.errors import InputError
from svf_lightning.sweep.results import Sweep

DAMAGE = {  # of the summary of a trial, and what is said
    "cut": ('{"status": "fini', "EOF while parsing"),
    "empty": ("", "EOF while parsing"),
    "null": ("null", "should be an object"),
    "a list": ("[]", "should be an object"),
    "a text": ('"finished"', "should be an object"),
    "a number": ("3", "should be an object"),
    "a status of another type": ('{"status": 3}', "status: "),
    "metrics of another type": ('{"status": "finished", "metrics": [1]}', "metrics: "),
    "a metric of another type": ('{"status": "finished", "metrics": {"x": 3}}', "metrics.x: "),
    "a mean of another type": ('{"status": "finished", "metrics": {"x": {"mean": "y"}}}', "metrics.x.mean: "),
    "claims of another type": ('{"status": "finished", "claims": {"x": 1}}', "claims: "),
    "no UTF-8": (b"\xff\xfe\x00", "expected value"),
}


@pytest.fixture
def folder(tmp_path):
    return done_sweep(tmp_path / "swept")


def test_a_sweep_whose_trials_are_done_is_read_as_it_was_written(folder):
    sweep = Sweep(folder)
    assert sweep.counts() == "6 done, 0 failed, 0 missing"
    assert sweep.table()["alignment/matched"].tolist() == pytest.approx([0.9 + i / 1000 for i in range(6)])
    assert sweep.failures() == []
    assert sweep.quantities()["alignment/matched"].name == "alignment/matched"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_summary_fails_its_trial_and_no_other_and_is_named(folder, typed, damage):
    content, why = DAMAGE[damage]
    trial = Sweep(folder).trials[2]
    (trial.folder / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = typed("report", folder)
    assert result.returncode == 0, result.stderr
    assert "5 done, 1 failed, 0 missing" in result.stdout
    assert f"failed: {trial.name}: its summary.json is damaged (" in result.stderr
    assert why in result.stderr
    assert "its summary.json is damaged" in (folder / "report.html").read_text()


def test_damaged_settings_fail_their_trial(folder, typed):
    trial = Sweep(folder).trials[2]
    (trial.folder / "config.yaml").write_text("model: [")
    result = typed("report", folder)
    assert "5 done, 1 failed, 0 missing" in result.stdout
    assert f"failed: {trial.name}: its config.yaml is damaged (" in result.stderr


def test_the_directory_of_another_trial_is_not_taken_for_its_own(folder, typed):
    first, second = Sweep(folder).trials[:2]
    shutil.rmtree(first.folder)
    shutil.copytree(second.folder, first.folder)
    result = typed("report", folder)
    assert "5 done, 1 failed, 0 missing" in result.stdout
    assert f"failed: {first.name}: its directory holds another run (seed_everything=1, not 0)" in result.stderr


def test_directories_that_are_missing_or_no_directories_or_not_the_sweeps(folder, typed):
    trials = Sweep(folder).trials
    shutil.rmtree(trials[0].folder)
    shutil.rmtree(trials[1].folder)
    trials[1].folder.write_text("a file")
    (folder / "trials" / "something else").mkdir()
    (trials[2].folder / "summary.json").unlink()
    (trials[2].folder / "summary.json").mkdir()
    result = typed("report", folder)
    assert result.returncode == 0, result.stderr
    assert "3 done, 1 failed, 2 missing" in result.stdout


@pytest.mark.parametrize("content", ["", "null", "[1]", '{"name": 3}', '{"name": "x", "metric": null, "trials": [{}]}'])
def test_a_damaged_index_is_one_line_that_says_what_to_do(folder, typed, content):
    (folder / "trials.json").write_text(content)
    result = typed("report", folder)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "trials.json cannot be read" in result.stderr
    assert "sweep FILE" in result.stderr


def test_ids_in_an_index_lead_nowhere_else(folder):
    index = json.loads((folder / "trials.json").read_text())
    for entry in index["trials"]:
        entry["id"] = "../../elsewhere"
        entry["varied"], entry["values"] = ["../.."], {"../..": "../../elsewhere"}
    (folder / "trials.json").write_text(json.dumps(index))
    assert {trial.folder.resolve().parent for trial in Sweep(folder).trials} == {(folder / "trials").resolve()}


def test_names_and_values_are_text_to_the_terminal_and_to_the_page(tmp_path, capsys):
    folder = done_sweep(tmp_path / "swept")
    index = json.loads((folder / "trials.json").read_text())
    index["name"] = "[/red] <script>alert(1)</script>"
    (folder / "trials.json").write_text(json.dumps(index))
    report_sweep(folder)
    assert "[/red] <script>alert(1)</script>" in " ".join(capsys.readouterr().out.split())
    assert "<script>alert(1)" not in (folder / "report.html").read_text()


def test_many_failures_are_not_all_listed_at_the_terminal(folder, typed):
    many = {**SIX, "seed_everything": {"values": list(range(20))}}
    shutil.rmtree(folder)
    for trial in Sweep(done_sweep(folder, many)).trials:
        (trial.folder / "summary.json").write_text("{")
    lines = typed("report", folder).stderr.splitlines()
    assert (len(lines), lines[-1]) == (11, "failed: 50 more, all of them on the page")


def test_an_index_of_a_version_before_is_read(folder):
    index = json.loads((folder / "trials.json").read_text())
    for entry in index["trials"]:
        del entry["sweep"]
    (folder / "trials.json").write_text(json.dumps(index))
    assert Sweep(folder).trials[0].sweep == "some"


def test_a_sweep_writes_a_damaged_index_again(folder, typed, tmp_path):
    (folder / "trials.json").write_text("{")
    file = write_sweep(tmp_path / "some.yaml", SIX, name="some")
    result = typed("sweep", file, "--sweep_dir", folder, "--jobs=1")
    assert result.returncode == 0, result.stderr
    assert "6 trials, 6 done before, 0 to run" in result.stderr


def test_a_sweep_needs_its_index(tmp_path):
    with pytest.raises(InputError, match="holds no sweep"):
        Sweep(tmp_path)
