"""What the program says of itself: its commands, its presets, the settings that matter."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from helpers.command_line import run_dir_of

from svf_lightning.preset_files import preset_path, presets
from svf_lightning.program import FUNCTIONS, main
from svf_lightning.run.closing import _claims_in_lines

QUICK = ("--trainer.max_steps=30", "--data.batch_size=16", "--model.n_instances=2", "--trainer.logger=false")


def test_without_a_command_all_commands_presets_and_three_examples_are_shown_on_short_lines(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 88  # only what can be copied is longer than the terminal
    described = [line for line in shown.splitlines() if re.match(r"  \w", line) and not line.startswith("  svf-")]
    names = {line.split()[0] for line in described}
    assert names == {"fit", "validate", "test", "replay", *FUNCTIONS, *presets(), *presets("replay")}
    assert all(len(line) <= 80 for line in described)
    assert len(re.findall(r"^  svf-lightning ", shown, re.MULTILINE)) == 3
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("args", [[], ["--help"], ["--version"]])
def test_what_needs_no_model_imports_none(args):
    code = f"import sys; from svf_lightning.__main__ import main; main({args}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    assert "svf-lightning" in result.stdout


def test_the_examples_are_command_lines_that_can_be_parsed(capsys, tmp_path):
    main([])
    text = capsys.readouterr().out.replace("\\\n", " ")
    for line in re.findall(r"^  svf-lightning (.*)$", text, re.MULTILINE):
        args = line.split("   ")[0].replace("MY_MODEL", str(tmp_path)).split()
        assert main([*args, "--print_config"]) == 0, line
        assert yaml.safe_load(capsys.readouterr().out)["experiment"]["name"]


def test_help_shows_the_values_that_the_command_would_run_with(typed):
    result = typed("fit", "--config", "multi_pair", "--model.lambda_attn=3", "--help")
    assert result.returncode == 0
    preset = yaml.safe_load(preset_path("multi_pair").read_text())
    for line in (
        "--model.lambda_attn=3.0", f"--model.n_instances={preset['model']['n_instances']}",
        f"--trainer.max_steps={preset['trainer']['max_steps']}", "--trainer.logger=svf_lightning.wandb_logger.RunLogger",
    ):  # fmt: skip
        assert f"  {line}\n" in result.stdout
    assert "usage: svf-lightning fit" in result.stdout
    assert "--data.n_instances" not in result.stdout  # it follows the model's
    assert "accumulate_grad_batches" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_help_of_everything_is_the_parsers(typed):
    result = typed("fit", "--help=all")
    assert result.returncode == 0
    assert "accumulate_grad_batches" in result.stdout
    assert "usage: svf-lightning" in result.stdout


def test_help_of_what_cannot_be_parsed_is_the_error(typed):
    result = typed("fit", "--help", "--model.n_instances=x")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1


# ---- run directories in place of files


def test_a_run_directory_stands_for_its_settings_and_the_last_run_needs_no_name(forked):
    first = run_dir_of(forked("fit", *QUICK), forked)
    again = forked("fit", "--config", str(first), "--trainer.max_steps=12")
    second = run_dir_of(again, forked)
    was, now = (yaml.safe_load((run / "config.yaml").read_text()) for run in (first, second))
    assert now["trainer"]["max_steps"] == 12
    assert now["data"] == was["data"]
    (second / "report.html").unlink()
    assert (
        forked("test", "--ckpt_path", str(second), "--trainer.logger=false").returncode == 0
    )  # no training of its own
    result = forked("report")
    assert result.stdout.strip() == f"{second.relative_to(forked.folder)}/report.html"
    assert (second / "report.html").is_file()


def test_no_run_to_report_is_one_line(forked):
    result = forked("report")
    assert result.returncode == 2
    assert re.search(r"no run in the folder runs.*Fix: ", result.stderr)


def test_the_page_is_named_at_the_end_and_opened_if_asked(forked):
    opened = forked.folder.parent / "opened"
    browser = forked.folder.parent / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    result = forked("fit", *QUICK, "--open", BROWSER=f"{browser} %s")
    run_dir = run_dir_of(result, forked)
    name = run_dir.relative_to(forked.folder)
    assert result.stderr.strip().splitlines()[-1] == f"page: {name}/report.html"
    assert opened.read_text().strip() == (run_dir / "report.html").as_uri()
    opened.unlink()
    assert forked("report", str(name), "--open", BROWSER=f"{browser} %s").returncode == 0
    assert opened.exists()
    opened.unlink()
    assert forked("report", str(name), BROWSER=f"{browser} %s").returncode == 0
    assert not opened.exists()


# ---- the closing output


def test_the_closing_output_fits_a_screen_and_has_every_claim_and_all_of_it_on_demand(forked):
    brief, full = forked("fit", *QUICK), forked("fit", *QUICK, "--verbose")
    run_dir_of(brief, forked)
    config = yaml.safe_load((run_dir_of(full, forked) / "config.yaml").read_text())
    assert "verbose" not in config
    lines = brief.stdout.splitlines()
    assert len(lines) + len(brief.stderr.splitlines()) < 40
    assert max(map(len, lines)) <= 80
    claims = yaml.safe_load(preset_path("single_pair").read_text())["experiment"]["claims"]
    verdicts = [line for line in lines if re.match(r"(yes|no|open|vacuous) +\w", line)]
    assert len(verdicts) == len(claims)
    assert sum(line.startswith("no ") for line in verdicts) == sum("│ no" in line for line in full.stdout.splitlines())
    assert "orthogonality/antipodal" in full.stdout
    assert "orthogonality/antipodal" not in brief.stdout
    assert "alignment/matched" in brief.stdout
    n_more = int(re.search(r"^(\d+) more metrics", brief.stdout, re.MULTILINE)[1])
    shown = sum(re.match(r"[a-z]+/\w+ ", line) is not None for line in lines)
    assert n_more + shown == sum(re.match(r" [a-z]+/\w+ ", line) is not None for line in full.stdout.splitlines())


def verdict(claim, kind="yes"):
    told = {"claim": claim, "figure": "", "metric": "a/b", "measured": 0.5, "needed": "> 0", "verdict": kind}
    return SimpleNamespace(claim=claim, verdict=kind, as_dict=lambda: told)


@pytest.mark.parametrize("n", [1, 11, 30])
def test_many_claims_are_a_line_each_and_keep_what_tells_variants_apart(n):
    words = "half of the way to alignment comes before half of that to orthogonality, in every instance"
    verdicts = [verdict(f"{words} (variant {i})") for i in range(n)]
    lines = [line.plain for line in _claims_in_lines(verdicts)][1:]
    assert len(lines) == (2 * n if n < 12 else n)
    assert all(f"(variant {i})" in "\n".join(lines) for i in range(n))
    assert max(map(len, lines)) <= 80


def test_options_that_stand_alone_mean_yes():
    from svf_lightning.cli.run import _with_flags

    assert _with_flags(["fit", "--verbose"]) == ["fit", "--verbose=true"]
    assert _with_flags(["fit", "--open", "--report", "false"]) == ["fit", "--open=true", "--report", "false"]
