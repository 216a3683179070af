"""What the documentation says is so: its commands parse, its code runs, its names exist, its tables are of this code."""

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from helpers.training import train

from svf_lightning.callbacks import Capture, SVDAlignment, TrajectoryWriter
from svf_lightning.program import FUNCTIONS, main
from svf_lightning.registry import BUILT_IN
from svf_lightning.testing import check_metric

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.startswith("python -m svf_lightning")
    }
)


def test_there_are_commands_of_every_kind():
    named = {shlex.split(line)[3] for line in COMMANDS}
    assert named >= {"fit", "test", "replay", *FUNCTIONS}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_of_the_documentation_is_understood(typed, line):
    command, *arguments = shlex.split(line)[3:]
    if command in FUNCTIONS:
        options = inspect.signature(FUNCTIONS[command]).parameters
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.removeprefix("--").split("=")[0] in options
            elif argument.startswith("sweeps/"):
                assert (ROOT / argument).is_file()
        return
    result = typed(command, *arguments, *([] if "--help" in arguments else ["--print_config"]))
    assert result.returncode == 0, result.stderr


def test_links_lead_to_files_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# ---- code


def code_of(page, begins):
    (block,) = [block for block in blocks(page, "python") if begins in block]
    return block


def test_the_example_of_a_metric_keeps_the_contract():
    scope = {}
    exec(code_of(ROOT / "README.md", "class FeatureNorms"), scope)
    check_metric(scope["FeatureNorms"]())


def test_the_example_of_reading_a_trajectory_reads_one(tmp_path, monkeypatch):
    code = code_of(ROOT / "README.md", "open_trajectory(")
    (folder,) = re.findall(r'open_trajectory\("(.+?)"\)', code)
    monkeypatch.chdir(tmp_path)
    from svf_lightning.callbacks import FeatureOrthogonality

    train(tmp_path / folder, 220, [Capture(), SVDAlignment(), FeatureOrthogonality(), TrajectoryWriter()])
    scope = {}
    exec(code, scope)
    assert scope["run"].sizes["step"] == 221
    assert np.isfinite(scope["run"]["alignment/matched"]).all()


def test_the_example_of_the_commands_from_python_runs(tmp_path, monkeypatch):
    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("webbrowser.open", opened.append)
    scope = {}
    exec(code_of(ROOT / "README.md", "svf.fit("), scope)
    assert scope["run"].summary["steps"] == 500
    assert opened == [(scope["run"].directory / "report.html").resolve().as_uri()]


def test_names_that_examples_import_exist():
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


# ---- the map of the house


def test_files_and_names_of_the_map_exist():
    text = (ROOT / "docs" / "developing.md").read_text()
    named = set(re.findall(r"`([^`\n]+)`", text))
    paths = {name for name in named if re.fullmatch(r"[\w./]+(/|\.\w+)", name) and ("/" in name or ".py" in name)}
    assert len(paths) > 20
    roots = [ROOT, ROOT / "svf_lightning", *(path for path in (ROOT / "svf_lightning").iterdir() if path.is_dir())]
    missing = [name for name in paths if not any((root / name).exists() for root in roots)]
    assert missing == []
    known = _names()
    classes = {name for name in named if re.fullmatch(r"[A-Z][a-zA-Z]+(\.\w+)?", name)}
    assert {"ProbeMetric", "RowSink", "Trial", "Capture", "ProbeMetric.version"} <= classes
    for name in classes - {"InputError"}:
        owner, _, attribute = name.partition(".")
        assert owner in known, name
        assert not attribute or hasattr(known[owner], attribute), name


def _names():
    """Everything that a module of this package defines, by name."""
    names = {}
    for path in (ROOT / "svf_lightning").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module not in ("svf_lightning.__main__", "svf_lightning.program") and "ray" not in module:
            names |= vars(importlib.import_module(module))
    return names


def test_rooms_stand_on_each_other_and_no_arrow_runs_up():
    """The floors of the map, lowest first; a module imports, at its top, what is on its own floor or below."""
    floors = [
        [
            *("errors", "terminal", "arguments", "draws", "files", "matrix_files", "sentences", "stop"),
            *("checkpoint_names", "preset_files"),
            *("rotary", "bridged", "heads", "metrics", "theory"),
        ],
        ["quantities", "probe"],
        ["trajectory", "rows", "zarr_backend", "zarr_files"],
        ["run"],
        ["callbacks", "toy", "replay"],
        ["registry", "figures", "testing"],
        ["wandb_logger", "wandb_media", "cli"],
        ["sweep"],
        ["pages"],
        ["commands"],
        ["program", "usage", "api", "__main__"],
    ]
    floor_of = {room: i for i, rooms in enumerate(floors) for room in rooms}
    package = ROOT / "svf_lightning"
    rooms = {path.stem for path in package.glob("*.py")} | {
        p.name for p in package.iterdir() if (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == floor_of.keys()
    up = []
    for path in package.rglob("*.py"):
        room = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("svf_lightning."):
                other = node.module.split(".")[1]
                if room != "__init__" and floor_of[other] > floor_of[room]:
                    up.append((str(path.relative_to(package)), node.module))
    assert up == []


def test_neither_the_toy_nor_the_replay_knows_the_other_or_the_callbacks():
    for room, others in (
        ("toy", ("replay", "callbacks")),
        ("replay", ("toy", "callbacks")),
        ("callbacks", ("toy", "replay")),
    ):
        for path in (ROOT / "svf_lightning" / room).rglob("*.py"):
            for other in others:
                assert f"from svf_lightning.{other}" not in path.read_text(), path


# ---- what is written by a program


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_claim_of_several_runs_has_their_mean_an_interval_over_runs_and_every_verdict(tables):
    def judged(measured, null, verdict):
        effect = None if measured is None else {"value": measured - null, "interval": [-9, 9]}
        return {
            "claim": "c", "figure": "Fig. 1", "measured": measured, "verdict": verdict, "holds": None, "needed": "mean > 0",
            "null": {"name": "start", "value": null}, "interval": [-9, 9], "effect": effect, "share": None, "n": 270,
        }  # fmt: skip

    told = tables.in_words(
        tables.over_runs([judged(0.2, 0.1, "yes"), judged(0.4, 0.1, "open"), judged(0.6, 0.4, "no")])
    )
    half = 4.302653 * 0.2 / 3**0.5  # Student's t with two degrees of freedom
    assert told.measured == f"0.4 [{0.4 - half:.3g}, {0.4 + half:.3g}]"
    assert told.null == "0.2 (start)"
    half = 4.302653 * 0.1 / 3**0.5
    assert told.effect == f"+0.2 [{0.2 - half:.3g}, {0.2 + half:.3g}]"
    alone = judged(0.2, 0.1, "yes")
    assert tables.over_runs([alone]) == alone
    gap = tables.in_words(tables.over_runs([alone, judged(None, None, "vacuous")]))
    assert (gap.measured, gap.effect) == ("0.2", "")


def test_runs_of_one_command_share_their_rows(tables, tmp_path, monkeypatch):
    claim = {"claim": "c", "figure": "f", "measured": 1.0, "holds": None, "needed": "mean", "n": 4, "interval": None}
    runs = {f"run{i}": {"status": "finished", "experiment": "e", "claims": [{**claim, "verdict": verdict}]}
            for i, verdict in enumerate(("yes", "yes", "no"))}  # fmt: skip
    monkeypatch.setattr(tables, "read_summary", lambda path: runs[path.name])
    monkeypatch.setattr(tables, "is_replay", lambda path: True)
    page = "\n".join(
        (tables.between("claims")[0], "| a |", "| - |", "| f | `fit --config x` | kept |", tables.between("claims")[1])
    )
    rows = tables.claims_table(page, [Path(name) for name in runs]).splitlines()[2:]
    assert rows[0] == "| f | `fit --config x` | kept |"
    assert rows[1].startswith("| f | `replay --config e` | c | 1 [1, 1] |")
    assert rows[1].endswith("| 3 runs | yes in 2, **no** in 1 |")
    assert len(rows) == 2
    runs["run1"]["claims"][0]["claim"] = "d"
    with pytest.raises(SystemExit, match="different claims"):
        tables.claims_table(page, [Path(name) for name in runs])
    runs["run1"]["status"] = "interrupted"
    with pytest.raises(SystemExit, match="run1 is interrupted"):
        tables.claims_table(page, [Path(name) for name in runs])


def test_tables_of_the_documentation_are_what_the_program_writes(tables):
    readme = (ROOT / "README.md").read_text()
    assert tables.replaced(readme, "presets", tables.presets_table()) == readme, "run python docs/tables.py"
    assert tables.metrics_page() == (ROOT / "docs" / "metrics.md").read_text(), "run python docs/tables.py"
    assert all(f"`{name}`" in tables.metrics_page() for name in BUILT_IN)


def test_the_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "replay", *FUNCTIONS):
        assert re.search(rf"^  {command} +\w", shown, re.MULTILINE), command


def test_the_wheel_has_every_package_of_the_tree():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "svf_lightning").rglob("__init__.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(declared) - {"svf_lightning.configs"}
    for kind in ("*.js", "*.css", "templates/*.html"):
        assert list(Path(str(resources.files("svf_lightning.pages"))).glob(kind))
