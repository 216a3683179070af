"""`workspace`: the saved view of a W&B project names nothing that runs do not log."""

import sys

import pytest
import yaml
from helpers.replays import replay

from svf_lightning import cli
from svf_lightning.__main__ import main
from svf_lightning.arguments import dotted
from svf_lightning.callbacks import AttentionOverWords, CausalAblation, DirectionIntervention, Firings
from svf_lightning.commands.workspace import FINAL, SETTINGS, TABLES, build, media_keys, panels_by_section
from svf_lightning.figures import FIGURES
from svf_lightning.registry import known
from svf_lightning.replay import FolderCheckpoints
from svf_lightning.rows import Rows
from svf_lightning.trajectory import open_trajectory
from svf_lightning.wandb_media import run_media


@pytest.fixture(scope="module")
def logged(tmp_path_factory, suite):
    """Names that W&B gets of a short run of the default preset, and of a short replay."""
    toy, real = (tmp_path_factory.mktemp(name) / "run" for name in ("toy", "replay"))
    cli.fit(
        [
            "--config=single_pair", "--trainer.max_steps=12", "--data.batch_size=32", "--model.n_instances=2",
            "--trainer.logger=false", f"--run_dir={toy}",
        ]
    )  # fmt: skip
    ablation = CausalAblation(n_removed=4)
    directions = DirectionIntervention(numbers=(2,), steps=())  # the last checkpoint alone
    callbacks = (ablation, directions, Firings(), AttentionOverWords())
    replay(FolderCheckpoints(str(suite)), real, callbacks=callbacks, n_prompts=7)
    names = {}
    for kind, run_dir in (("toy", toy), ("replay", real)):
        trajectory = open_trajectory(run_dir)
        ((_, metrics),) = Rows.read(trajectory.isel(step=[-1]), known(trajectory)).to_log(every=1, last=-1)
        names[kind] = {*metrics, *run_media(run_dir)[0]}
    return names


@pytest.mark.parametrize("kind", ["toy", "replay"])
def test_every_metric_and_figure_of_the_view_is_logged(logged, kind):
    for title, panels in panels_by_section().items():
        if (kind == "toy") == ("Toy" in title):
            assert {metric for panel in panels for metric in panel.metrics} <= logged[kind], title
    for title, keys in media_keys().items():
        if kind in title:
            assert keys
            # Fig. 2b is of several pairs, Fig. 4 of runs with the theory
            assert set(keys) - {"figures/fig_2b", "figures/fig_4"} <= logged[kind]
            assert {key.removeprefix("figures/") for key in keys} <= FIGURES.keys()
    assert set(TABLES) - {"tables/claims"} <= logged["toy"] | logged["replay"]


def test_every_setting_of_the_view_is_one_of_a_run():
    assert set(SETTINGS) <= dotted(yaml.safe_load(cli.FitSettings().of([]))).keys()
    assert "alignment/matched" in FINAL


@pytest.mark.parametrize("kind", ["toy", "replay"])
def test_a_run_logs_at_most_about_a_hundred_names(logged, kind):
    assert 40 < len(logged[kind]) <= 100


def test_the_view_has_a_panel_for_each_of_them_and_says_where_to_look():
    model = build("our project", "us", "first look")._to_model().model_dump_json(by_alias=True)
    assert sum(len(panels) for panels in panels_by_section().values()) >= 8
    for panels in panels_by_section().values():
        for panel in panels:
            assert panel.title in model
            assert all(f'"{metric}"' in model for metric in panel.metrics)
    assert "Look at *Alignment and orthogonality* first" in model
    assert all(key in model for keys in media_keys().values() for key in keys)


def test_the_command_saves_the_view_and_prints_its_address(monkeypatch, capsys):
    import wandb_workspaces.workspaces as ws

    saved = []
    monkeypatch.setattr(ws.Workspace, "save", lambda view: saved.append(view))
    monkeypatch.setattr(ws.Workspace, "url", property(lambda view: "https://wandb.example/us/our?nw=1"))
    assert main(["workspace", "--project=our", "--entity=us"]) == 0
    assert capsys.readouterr().out.splitlines() == ["https://wandb.example/us/our?nw=1"]
    assert [(view.project, view.entity) for view in saved] == [("our", "us")]


def test_without_the_package_or_an_account_it_says_what_is_missing(monkeypatch, capsys):
    import wandb_workspaces.workspaces as ws

    def refuse(view):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    assert main(["workspace", "--entity=us"]) == 2
    error = capsys.readouterr().err
    assert "no route to host" in error
    assert "wandb login" in error
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main(["workspace", "--entity=us"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'svf-lightning[workspace]'" in error
    assert len(error.splitlines()) == 1
