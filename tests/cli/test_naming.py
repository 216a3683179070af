"""A replay is named by what it measured, and claims are judged about the model that they were made for."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from helpers.checkpoints import save

from svf_lightning.cli.naming import _folder_name
from svf_lightning.cli.replaying import ReplayCLI
from svf_lightning.cli.run import options, parser_kwargs
from svf_lightning.replay import CheckpointReplay, ReplayData
from svf_lightning.replay.trainer import ReplayTrainer
from svf_lightning.run.summary import read_summary


class Parsed(Exception):
    pass


class OnlyParsed(ReplayCLI):
    def before_instantiate_classes(self):
        raise Parsed(self.config[self.subcommand])


@pytest.fixture
def experiment_of(tmp_path, monkeypatch, capsys):
    """Name, number of claims and the line of a command."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "my_model")
    (tmp_path / "mine.jsonl").write_text("")

    def parse(*args):
        capsys.readouterr()
        with pytest.raises(Parsed) as parsed:
            OnlyParsed(
                CheckpointReplay,
                ReplayData,
                trainer_class=ReplayTrainer,
                parser_kwargs=parser_kwargs(ReplayCLI),
                **options(["replay", *args]),
            )
        experiment = parsed.value.args[0].experiment
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("svf-lightning")]
        return SimpleNamespace(name=experiment.name, claims=len(experiment.claims), tags=experiment.tags, lines=lines)

    return parse


FOLDER = ("--data.source=svf_lightning.replay.FolderCheckpoints", "--data.source.init_args.folder=my_model")
HUB = "--data.source.init_args.repo="


@pytest.mark.parametrize(
    ("args", "name", "claims"),
    [
        ((), "tiny_suite", 19),
        (("--data.n_prompts=9", "--data.source.init_args.steps=[0]"), "tiny_suite", 19),
        (("--data.source.init_args.folder=elsewhere",), "tiny_suite", 19),  # the same suite in another place
        (
            ("--data.source.init_args.settings.seed=3",),
            "tiny_suite_seed=3",
            19,
        ),  # of another seed, for which the claims hold or do not
        (("--data.source.init_args.settings.n_heads=2",), "tiny_suite_n_heads=2", 0),
        (FOLDER, "my_model", 0),
        (("--data.prompts=mine.jsonl",), "tiny_suite_mine", 0),
        ((*FOLDER, "--data.prompts=mine.jsonl"), "my_model_mine", 0),
        ((*FOLDER, "--experiment.name=chosen"), "chosen", 0),
        ((*FOLDER, "--experiment.claims=[]"), "my_model", 0),
        (("--config=gpt2",), "gpt2", 12),
        (("--config=gpt2", f"{HUB}distilgpt2"), "distilgpt2", 0),
        (("--config=pythia_160m", "--data.source.init_args.revisions=all"), "pythia_160m", 13),
        (("--config=pythia_160m", f"{HUB}EleutherAI/pythia-410m"), "pythia-410m", 0),
        (("--config=smollm2", *FOLDER), "my_model", 0),
        (("--data.prompts=ioi_wang",), "tiny_suite_ioi_wang", 0),
        (("--config=paper_gpt2",), "paper_gpt2", 6),
        (("--config=paper_gpt2", "--data.prompts=ioi"), "paper_gpt2", 0),
        (("--config=paper_pythia_160m", "--data.source.init_args.revisions=all"), "paper_pythia_160m", 7),
    ],
)
def test_name_and_claims_belong_to_the_model_and_the_prompts_of_the_preset(experiment_of, args, name, claims):
    found = experiment_of(*args)
    assert (found.name, found.claims) == (name, claims)
    preset = next((arg.split("=")[1] for arg in args if arg.startswith("--config")), "tiny_suite")
    assert len(found.lines) == (0 if (found.name, found.claims > 0) == (preset, True) else 1)
    if found.lines:
        assert f"than {preset} has" in found.lines[0]
        assert found.name == "chosen" or name in found.lines[0]
        assert found.name == "chosen" or found.tags == ["replay", name]


CLAIM = {"claim": "mine", "figure": "", "metric": "sad/accuracy", "relation": ">=", "threshold": 0.5}
SOURCE = {"class_path": "svf_lightning.replay.FolderCheckpoints", "init_args": {"folder": "my_model"}}


def test_a_file_without_a_name_is_named_by_its_source(experiment_of, tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data": {"source": SOURCE}}))
    assert experiment_of("--config=own.yaml").name == "my_model"


def test_a_file_that_names_itself_keeps_name_and_claims_until_something_else_is_measured(experiment_of, tmp_path):
    own = {"experiment": {"name": "own", "claims": [CLAIM]}, "data": {"source": SOURCE}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    found = experiment_of("--config=own.yaml", "--data.batch_size=3")
    assert (found.name, found.claims, found.lines) == ("own", 1, [])
    save(tmp_path / "other")
    found = experiment_of("--config=own.yaml", "--data.source.init_args.folder=other")
    assert (found.name, found.claims) == ("other", 0)
    # a second file that has another model measured does not take the name either
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"data": {"source": SOURCE}}))
    found = experiment_of("--config=gpt2", "--config=second.yaml")
    assert (found.name, found.claims) == ("my_model", 0)
    # and one that states both is believed
    found = experiment_of("--config=gpt2", "--config=own.yaml")
    assert (found.name, found.claims) == ("own", 1)


@pytest.mark.parametrize(
    ("model", "prompts", "name"),
    [("a/../b", "ioi", "a_.._b"), ("..", "ioi", "replay"), ("", "ioi", "replay"), ("x" * 99, "ioi", "x" * 64),
     ("Ünï code", "ioi", "Ünï_code"), ("m", "folder/my prompts.jsonl", "m_my_prompts")],
)  # fmt: skip
def test_a_name_is_one_folder(model, prompts, name):
    assert _folder_name(model, prompts) == name


def test_the_command_files_a_model_of_ones_own_under_its_name(suite, command, typed):
    shutil.copytree(suite, command.folder / "my_named_model")
    source = ["--data.source=svf_lightning.replay.FolderCheckpoints", "--data.source.init_args.folder=my_named_model"]
    result = typed(
        "replay", *source, "--data.source.init_args.steps=[0,8]", "--data.n_prompts=5", "--trainer.logger=false"
    )
    assert result.returncode == 0, result.stderr
    run_dir = command.folder / result.stdout.strip().splitlines()[-1]
    assert run_dir.parent.name == "my_named_model"
    assert "19 claims about tiny_suite are not judged" in result.stderr
    summary = read_summary(run_dir)
    assert (summary["experiment"], summary["claims"]) == ("my_named_model", [])
    page = (run_dir / "report.html").read_text()
    assert "<title>my_named_model</title>" in page
    assert "No claim was judged" in page
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())["experiment"]
    assert (settings["name"], settings["claims"], settings["tags"]) == (
        "my_named_model", [], ["replay", "my_named_model"],
    )  # fmt: skip
    assert "tiny_suite" not in json.dumps(settings)
