"""`presets`: the presets of fit and replay, one line each."""

import yaml

from svf_lightning.cli import presets
from svf_lightning.preset_files import preset_path


def test_every_preset_has_a_line_with_its_figures_and_what_it_shows(typed):
    result = typed("presets", COLUMNS="200")
    assert result.returncode == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    for folder in ("", "replay"):
        for name in presets(folder):
            about = yaml.safe_load(preset_path(name, folder).read_text())["experiment"]
            assert about["shows"] in lines[name]
            assert about["figures"] in lines[name]
    assert len(presets()) == 19
    settings = yaml.safe_load(preset_path("robust_seed").read_text())
    assert f"{settings['trainer']['max_steps']:,} steps x {settings['model']['n_instances']}" in lines["robust_seed"]


def test_a_narrow_terminal_shows_the_names_whole(typed):
    result = typed("presets", COLUMNS="70")
    assert {*presets(), *presets("replay")} <= {line.split()[0] for line in result.stdout.splitlines()}
