"""Sweep files of any kind, directories of trials with anything in them, and processes that are killed."""

import copy
import itertools
import json
import random
import shutil
import signal
import time
from datetime import date
from pathlib import Path

import pytest
import yaml
from helpers.killers import killer
from helpers.sweeps import COMMAND, SIX, done_sweep, write_sweep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svf_lightning.sweep.results import Sweep
from svf_lightning.trajectory import open_trajectory

VALID = {
    "method": "grid",
    "name": "some",
    "metric": {"name": "alignment/matched", "goal": "maximize"},
    "run_cap": 3,
    "command": COMMAND,
    "early_terminate": {"type": "hyperband", "min_iter": 10},
    "parameters": {
        "model.lambda_attn": {"values": [1.0, 3.0]},
        "model.learning_rate": {"value": 0.001},
        "seed_everything": {"distribution": "int_uniform", "min": 0, "max": 3},
        "data": {"parameters": {"seed": {"values": [0]}}},
    },
}
RANDOM = {
    **VALID,
    "method": "random",
    "parameters": {
        "a": {"min": 0.1, "max": 0.3},
        "b": {"distribution": "q_log_uniform_values", "min": 0.1, "max": 3, "q": 0.5},
        "c": {"values": [1, 2], "probabilities": [0.5, 0.5]},
        "d": {"distribution": "log_normal", "mu": 0, "sigma": 1},
        "e": {"distribution": "beta", "a": 1, "b": 1},
        "f": {"distribution": "log_uniform", "min": -1, "max": 1},
    },
}
ANYTHING = {
    "null": None,
    "true": True,
    "zero": 0,
    "a negative number": -1,
    "a large number": 10**400,
    "not a number": float("nan"),
    "infinity": float("inf"),
    "a date": date(2026, 11, 25),
    "bytes": b"\xff\x00",
    "a set": {1, 2},
    "an empty text": "",
    "a path": "../../evil",
    "an absolute path": "/tmp/evil",
    "a long text": "x" * 300,
    "a macro": "${args}",
    "half a macro": "${",
    "an empty list": [],
    "a list": [[1], {"a": None}],
    "an empty mapping": {},
    "a mapping": {1: {"values": [2]}},
}
TAGS = [
    "!!python/object/apply:os.system ['touch evil']",
    "!!python/name:os.system",
    "!!int x",
    "!!float ''",
    "!!bool x",
]
TAGS += ["!!timestamp x", "!!set {a, b}", "!!omap [a: 1]", "!!binary '='", "!custom 3", "*nothing", "&a [*a]", "<<: 3"]
TAGS += ['"\\ud800"', "2026-13-45", "1:30", "=", "? [a] : b", "%", "`", "@x", "\t- x", "{", "'"]


def places(value, path=()):
    """Every place in nested mappings and lists."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def changed(content, path, value):
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


class Judge:
    """What the command makes of a file: trials, or one line; and nothing is written for a file that is refused."""

    def __init__(self, typed, folder, tmp_path):
        self.typed, self.folder, self.file = typed, folder, tmp_path / "some.yaml"

    def __call__(self, text):
        """0 or 1 for a wrong result, the message, and which file it was."""
        self.file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass"))
        try:
            result = self.typed("sweep", self.file, "--dry_run", "--count=20")
            lines = [line for line in result.stdout.splitlines() if line.startswith("python -m svf_lightning fit")]
            right = result.returncode == 0 and lines
            if result.returncode == 2:
                again = self.typed("sweep", self.file, "--count=20", "--jobs=1")
                right = not result.stdout and len(result.stderr.splitlines()) == 1 and again.returncode == 2
            message = result.stderr if result.returncode else ""
        except Exception as error:  # that would have been a traceback
            right, message = False, f"{type(error).__name__}: {error}"
        right = right and not list(self.folder.iterdir())
        return {"wrong": int(not right), "message": message, "what": str(text)[:300]}


@pytest.fixture
def judge(typed, command, tmp_path):
    return Judge(typed, command.folder, tmp_path)


@pytest.mark.parametrize("name", ANYTHING)
def test_a_sweep_file_with_any_type_at_any_place_gives_trials_or_one_line(injected, judge, name):
    for content in (VALID, RANDOM):
        for path in places(content):
            text = yaml.dump(changed(content, path, ANYTHING[name]), sort_keys=False)
            injected(f"sweep file: {name} at any place", **judge(text))


def test_tags_and_broken_yaml_give_trials_or_one_line(injected, judge):
    marker = "MARKER"
    for tag, path in itertools.product(
        TAGS, [("name",), ("parameters", "model.lambda_attn", "values", 0), ("method",)]
    ):
        text = yaml.safe_dump(changed(VALID, path, marker), sort_keys=False)
        injected("sweep file: a YAML tag, an alias or broken YAML", **judge(text.replace(marker, tag)))


def test_encodings_and_sizes_give_trials_or_one_line(injected, judge):
    text = yaml.safe_dump(VALID, sort_keys=False)
    named = text.replace("some", "größe")
    laughs = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9 if i else ['1'] * 9)}]\n" for i in range(9))
    hostile = [named.encode(encoding) for encoding in ("latin-1", "utf-16", "utf-32", "cp1252", "utf-8-sig")]
    hostile += [text.encode() + b"\x00", b"\xff" * 100, b"", b"\n" * 1000, text * 2, text + "\n---\n" + text, laughs]
    hostile += [f"description: {'x' * size}\n{text}" for size in (10**5, 2 * 10**6)]
    hostile += [f"{'a: {' * depth}{'}' * depth}" for depth in (15, 50, 500, 5000, 100_000)]
    hostile += [f"{'- ' * depth}x" for depth in (15, 50, 500, 5000, 100_000)]
    for content in hostile:
        injected("sweep file: an encoding or a size", **judge(content))
    for length in range(0, len(text), 7):
        injected("sweep file: cut short", **judge(text[:length]))


_LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.binary(max_size=3)
)
_TREES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
_FILES = st.one_of(
    _TREES,
    st.fixed_dictionaries(
        {"method": st.sampled_from(["grid", "random"]), "command": st.just(COMMAND)},
        optional={
            "parameters": st.dictionaries(
                st.sampled_from(["model.lambda_attn", "x", "model"]),
                st.dictionaries(st.sampled_from(["value", "values", "min", "max", "q", "distribution", "parameters"]), _TREES, max_size=3),
                max_size=3,
            ),
            "metric": _TREES, "run_cap": _TREES, "name": _TREES, "early_terminate": _TREES, "controller": _TREES,
        },
    ),
)  # fmt: skip


def test_a_sweep_file_of_arbitrary_structure_gives_trials_or_one_line(injected, judge):
    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(_FILES)
    def of(content):
        try:
            text = yaml.dump(content, sort_keys=False, allow_unicode=True)
        except Exception:
            return
        injected("sweep file: arbitrary structure", **judge(text))

    of()


HOSTILE_NAMES = [
    "..",
    ".",
    "../../evil",
    "/tmp/evil",
    "a/b",
    "a\\b",
    "~/evil",
    ".git",
    "x" * 300,
    "é" * 150,
    "a\nb",
    "\0",
]
HOSTILE_NAMES += [" ", "\u202e", "\x1b[31m"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_written(injected, typed, command, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    file = tmp_path / "hostile.yaml"
    file.write_text(yaml.dump({**VALID, "name": name}))
    result = typed("sweep", file, "--jobs=1")
    # ~ is a letter like others, as no shell reads it
    right = result.returncode == 2 and len(result.stderr.splitlines()) == 1
    right = right and sorted(tmp_path.rglob("*")) == sorted([*before, file])
    injected("sweep: a name that leads elsewhere", wrong=int(not right), message=result.stderr, what=name)


# ---- what is in the directories of trials ----------------------------------------------------------------------------


def test_a_summary_of_any_type_at_any_place_fails_its_trial_alone(injected, tmp_path):
    folder = done_sweep(tmp_path / "swept")
    trial = Sweep(folder).trials[2]
    path = trial.folder / "summary.json"
    whole = json.loads(path.read_text())
    before = Sweep(folder).table().drop(index=2)
    types = [None, True, 3, -1.5, "x", [], [1], {}, {"x": 1}, float("nan"), "\ud800", 10**400]
    texts = [json.dumps(changed(whole, place, value)) for place in places(whole) for value in types]
    texts += [json.dumps(value) for value in types]
    texts += [path.read_text()[:length] for length in range(0, len(path.read_text()) - 3, 5)]
    for text in texts:
        path.write_text(text)
        sweep = Sweep(folder)
        try:
            table, cells = sweep.table(), sweep.cells()
            others = table.drop(index=2)[before.columns]
            state = sweep.state(sweep.trials[2])
            right = others.equals(before) and len(cells) == 3
            right = right and (
                state != "failed" or "summary.json is damaged" in sweep.error(sweep.trials[2]) or '"failed"' in text
            )
            # a number that was damaged is no number, or is that number; it is never the one of before
            message = sweep.error(sweep.trials[2])
        except Exception as error:
            right, message = False, f"{type(error).__name__}: {error}"
        injected("summary of a trial: any type, or cut", wrong=int(not right), message=message, what=text[:300])


def test_trials_that_are_not_what_they_were_are_named_and_table_and_page_come(injected, typed, tmp_path):
    def removed(folder, other):
        shutil.rmtree(folder)

    def a_file(folder, other):
        shutil.rmtree(folder)
        folder.write_text("x")

    def another_trial(folder, other):
        shutil.rmtree(folder)
        shutil.copytree(other, folder)

    def a_link_to_another(folder, other):
        shutil.rmtree(folder)
        folder.symlink_to(other)

    def a_loop(folder, other):
        shutil.rmtree(folder)
        folder.symlink_to(folder)

    def no_summary(folder, other):
        (folder / "summary.json").unlink()

    def a_folder_for_a_summary(folder, other):
        (folder / "summary.json").unlink()
        (folder / "summary.json").mkdir()

    def no_yaml(folder, other):
        (folder / "config.yaml").write_text("a: [")

    def no_text(folder, other):
        (folder / "config.yaml").write_bytes(b"\xff\xfe")

    def cut(folder, other):
        (folder / "summary.json").write_text('{"status":')

    faults = [
        removed,
        a_file,
        another_trial,
        a_link_to_another,
        a_loop,
        no_summary,
        a_folder_for_a_summary,
        no_yaml,
        no_text,
        cut,
    ]
    for i, fault in enumerate(faults):
        folder = done_sweep(tmp_path / str(i))
        trials = Sweep(folder).trials
        fault(trials[0].folder, trials[1].folder)
        result = typed("report", folder)
        right = result.returncode == 0 and "5 done" in result.stdout and (folder / "report.html").is_file()
        right = right and ("1 missing" in result.stdout or trials[0].name in result.stderr)
        what = fault.__name__.replace("_", " ")
        injected(f"directory of a trial: {what}", wrong=int(not right), message=result.stderr, what=what)


# ---- processes that are killed ---------------------------------------------------------------------------------------

LAMBDAS = {"model.lambda_attn": {"values": [1.0, 2.0, 13.0, 3.0]}, "seed_everything": {"values": [0, 1, 2]}}


def whole(trial):
    return open_trajectory(trial.folder)["step"].values.tolist() == [0, 5, 10]


@pytest.mark.parametrize("jobs", [1, 3])
def test_workers_that_are_killed_take_no_innocent_trial_with_them(injected, forked, tmp_path, jobs):
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(guilty=13.0))
    result = forked("sweep", file, f"--jobs={jobs}", "--sweep_dir", tmp_path / "swept", timeout=900)
    sweep = Sweep(tmp_path / "swept")
    for trial in sweep.trials:
        guilty = trial.values["model.lambda_attn"] == 13.0
        right = sweep.state(trial) == ("failed" if guilty else "done") and (guilty or whole(trial))
        if guilty:
            injected("a worker is killed: the guilty trial", wrong=int(not right), message=sweep.error(trial))
        else:
            injected("a worker is killed: an innocent trial", lost=int(not right), what=result.stderr)


def test_a_sweep_that_is_killed_at_any_time_goes_on_and_does_nothing_twice(injected, forked, tmp_path):
    """Killed again and again, until it is done before its time."""
    file, folder = write_sweep(tmp_path / "some.yaml", SIX), tmp_path / "swept"
    options = ["sweep", file, "--jobs=2", "--cohorts=false", "--sweep_dir", folder]
    draw, known, code = random.Random(0), {}, None
    for _ in range(8):
        process = forked.start(*options)
        deadline = time.monotonic() + draw.uniform(5, 30)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        code = process.poll()
        if code is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        now = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}
        injected(
            "the sweep's process is killed", lost=int(not known.items() <= now.items()), what=process.output("err")
        )
        known = now
        if code is not None:
            break
    if code is None:
        code = forked(*options, timeout=900).returncode
    sweep = Sweep(folder)
    right = code == 0 and all(sweep.state(trial) == "done" and whole(trial) for trial in sweep.trials)
    injected("the sweep's process is killed", n=0, lost=int(not right), what=sweep.counts())


def test_a_process_of_ray_that_is_killed_fails_the_guilty_trial_alone(injected, forked, tmp_path):
    pytest.importorskip("ray")
    file = write_sweep(tmp_path / "some.yaml", LAMBDAS, extra=killer(guilty=13.0), run_cap=8)
    result = forked(
        "sweep", file, "--engine=ray", "--jobs=1", "--sweep_dir", tmp_path / "swept", timeout=900,
        PYTHONPATH=str(Path(__file__).parents[1]),  # for the processes of Ray
    )  # fmt: skip
    sweep = Sweep(tmp_path / "swept")
    for trial in sweep.trials:
        guilty = trial.values["model.lambda_attn"] == 13.0
        right = sweep.state(trial) == ("failed" if guilty else "done")
        injected(
            "a process of Ray is killed", lost=int(not right), message=sweep.error(trial), what=result.stderr[-2000:]
        )


def test_a_node_of_ray_that_is_lost_loses_no_trial(injected, command, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    file, folder = write_sweep(tmp_path / "some.yaml", LAMBDAS, run_cap=6), tmp_path / "swept"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        options = ("--engine=ray", "--ray_address", cluster.address, "--cohorts=false", "--sweep_dir", folder)
        process = command.start("sweep", file, *options)
        deadline = time.monotonic() + 300
        while not list(folder.glob("trials/*/summary.json")):  # both nodes have a trial by now, and the next ones
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)
        _, said = process.communicate(timeout=600)
        sweep = Sweep(folder)
        lost = sum(sweep.state(trial) != "done" or not whole(trial) for trial in sweep.trials)
        injected(
            "a node of Ray is killed", n=1, lost=lost, what=f"{process.returncode} {sweep.counts()} {said[-2000:]}"
        )
    finally:
        cluster.shutdown()
